"""Models of transformers train on fastattn as they do on eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="4.57")

from fastattn.integrations import transformers as integration  # noqa: E402
from transformers_models import (  # noqa: E402
    ENCODER_DECODERS,
    ENCODERS,
    FIVE,
    LENGTH,
    MODELS,
    PADDING,
    PARTICULAR,
    bart,
    build,
    examples,
    gemma2,
    gpt_oss,
    llama,
    mistral,
    model_name,
    t5,
    tokens,
    use,
)

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()


@pytest.fixture(scope="module", params=MODELS, ids=model_name)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param).train()


def step(model: Any, implementation: str, loss: Any = None, **inputs: Any) -> tuple[Tensor, Gradients]:
    """The loss, of the model or what `loss` makes of its output, and the gradient of every parameter."""
    model.zero_grad()
    output = use(model, implementation)(**inputs)
    value = output.loss if loss is None else loss(output)
    value.backward()
    return value.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def agree(got: tuple[Tensor, Gradients], want: tuple[Tensor, Gradients]) -> None:
    """Within float32's rounding, which is all there is of some gradients: a key's bias has none but that."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    assert got[1].keys() == want[1].keys()
    largest = max(gradient.abs().max().item() for gradient in want[1].values())
    for name, gradient in want[1].items():
        tolerance = 5e-6 * gradient.abs().max().item() + 1e-6 * largest
        assert (got[1][name] - gradient).abs().max().item() <= tolerance, name


@pytest.fixture(scope="module", params=[*MODELS, *PARTICULAR], ids=model_name)
def any_model(request: pytest.FixtureRequest) -> Any:
    return build(request.param).train()


@pytest.mark.parametrize("padding", PADDING)
def test_a_step_is_that_of_eager(any_model: Any, padding: str) -> None:
    model, inputs = any_model, examples(any_model, padding)
    expected, actual = (step(model, implementation, **inputs) for implementation in ("eager", "fastattn"))
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert set(actual[1]) == {name for name in learned if "indexer" not in name}
    agree(actual, expected)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_teaches_nothing(model: Any, padding: str) -> None:
    """Other tokens in the place of padding give the same loss, and the same gradients."""
    steps = []
    for filler in (3, 4):
        inputs = examples(model, padding)
        for ids, mask in (
            ("input_ids", "attention_mask"),
            ("decoder_input_ids", "decoder_attention_mask"),
        ):
            if ids in inputs:
                inputs[ids] = torch.where(inputs[mask] == 0, filler, inputs[ids])
        steps.append(step(model, "fastattn", **inputs))
    agree(*steps)


# transformers 4 warns that only eager returns weights; here fastattn does.
@pytest.mark.filterwarnings("ignore:.output_attentions=True. is not supported:UserWarning")
def test_gradients_pass_through_returned_weights(model: Any) -> None:
    inputs = examples(model) | {"output_attentions": True}

    def loss(output: Any) -> Tensor:
        kinds = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
        weights = [layer for kind in kinds for layer in getattr(output, kind, None) or ()]
        assert len(weights) >= model.config.num_hidden_layers
        # Squares: rows of weights sum to 1 whatever the parameters are.
        return output.loss + sum(layer.square().sum((-2, -1)).mean() for layer in weights)

    expected, actual = (
        step(model, implementation, loss, **inputs) for implementation in ("eager", "fastattn")
    )
    agree(actual, expected)
    assert actual[0] != step(model, "fastattn", **inputs)[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [mistral, bart], ids=model_name)
def test_checkpointing_drops_the_same_again(make: Any, reentrant: bool) -> None:
    model = build(make, attention_dropout=0.3).train()
    inputs = examples(model, "left")
    torch.manual_seed(5)
    plain = step(model, "fastattn", **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    agree(step(model, "fastattn", **inputs), plain)


@pytest.mark.parametrize("make", [llama, gemma2, gpt_oss, *ENCODERS, *ENCODER_DECODERS], ids=model_name)
def test_a_seed_repeats_dropout(make: Any) -> None:
    model = build(make, attention_dropout=0.3).train()
    inputs = examples(model, "right")
    steps = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        steps.append(step(model, "fastattn", **inputs))
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=0)
    assert not torch.equal(steps[2][0], steps[0][0])
    expected, actual = (
        step(model.eval(), implementation, **inputs) for implementation in ("eager", "fastattn")
    )
    agree(actual, expected)


def test_dropout_drops_weights_and_scales_the_others() -> None:
    """Of the function itself: what is returned is what was applied, forward and backward."""
    query, key, value = (
        torch.randn(2, heads, LENGTH, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)
    )
    module = torch.nn.Module().train()

    def attend(dropout: float) -> Any:
        return integration.attention_forward(
            module, query, key, value, None, dropout=dropout, output_attentions=True
        )

    whole = attend(0.0)[1]
    out, weights = attend(0.25)
    dropped = weights == 0
    below = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert 0.2 < dropped[..., below].double().mean() < 0.3
    expected = torch.where(dropped, 0, whole / 0.75)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    expected_out = (expected @ value.repeat_interleave(3, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    factors = torch.randn_like(out)
    gradients = [torch.autograd.grad((o * factors).sum(), (query, key, value)) for o in (out, expected_out)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_a_few_steps_of_an_optimizer() -> None:
    """Losses fall, and fall alike."""
    curves = []
    for implementation in ("eager", "fastattn"):
        model = build(mistral).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(8):
            losses.append(step(model, implementation, **examples(model, "left"))[0])
            optimizer.step()
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)
    assert curves[1][-1] < 0.7 * curves[1][0]


@FIVE
def test_the_bias_of_t5_learns_in_every_layer_that_adds_it() -> None:
    model = build(t5).train()
    _, gradients = step(model, "fastattn", **examples(model, "right"))
    learned = [gradient for name, gradient in gradients.items() if "relative_attention_bias" in name]
    assert len(learned) == 2 and all(gradient.any(0).all() for gradient in learned)


def test_a_decoder_as_an_encoder() -> None:
    """transformers 5 makes the mask for it, 4 has none: what counts is the mask."""
    model = build(llama)
    logits = []
    for implementation in ("eager", "fastattn"):
        with torch.no_grad():
            logits.append(use(model, implementation)(input_ids=tokens()[0], is_causal=False).logits)
    torch.testing.assert_close(*logits, rtol=2e-5, atol=2e-5)


def test_bfloat16_trains() -> None:
    model = build(mistral).train()
    inputs = examples(model, "left")
    expected = step(model, "fastattn", **inputs)
    lowered = step(model.bfloat16(), "fastattn", **inputs)
    torch.testing.assert_close(lowered[0].float(), expected[0], rtol=0.02, atol=0)
    for name, gradient in expected[1].items():
        assert lowered[1][name].dtype == torch.bfloat16
        cosine = torch.cosine_similarity(lowered[1][name].float().flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.99, name


@pytest.mark.parametrize("make", ENCODER_DECODERS, ids=model_name)
def test_gradients_reach_the_encoder(make: Any) -> None:
    model = build(make).train()
    _, gradients = step(model, "fastattn", **examples(model))
    encoder = {name: gradient for name, gradient in gradients.items() if ".encoder" in f".{name}"}
    assert len(encoder) > 10
    assert all(gradient.any() for name, gradient in encoder.items() if "k_proj.bias" not in name)


@pytest.mark.parametrize("make", [llama, gemma2, gpt_oss, bart], ids=model_name)
def test_autocast_trains(make: Any) -> None:
    """Where cosines are float32, query and key are, too, beside a bfloat16 value."""
    model = build(make).train()
    inputs = examples(model, "left")
    steps = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = use(model, "fastattn")(**inputs).loss
        steps.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(steps[1][0].float(), steps[0][0], rtol=0.02, atol=0)
    for lowered, gradient in zip(steps[1][1], steps[0][1], strict=True):
        if gradient.abs().max() > 1e-6:  # a key's bias has none
            assert torch.cosine_similarity(lowered.flatten(), gradient.flatten(), dim=0) > 0.95
