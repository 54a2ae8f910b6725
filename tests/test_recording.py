"""Recorded attention is that of projections by hand, and recording leaves no trace."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastattn as fa
from fastattn import observers, reference, viz
from fastattn.nn import CrossAttention, SelfAttention
from fastattn.viz import record

CLOSE = {"rtol": 0, "atol": 2e-6}
X = torch.linspace(-2, 2, 2 * 5 * 16).sin().reshape(2, 5, 16)


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    multihead = nn.functional.multi_head_attention_forward
    yield
    assert observers.blocks == 0 and not observers.watching()
    assert nn.functional.multi_head_attention_forward is multihead


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_hand(query, key, hidden=None, scale=None):
    """Softmax of the scores of (B, H, L, D), in float64; True in `hidden`: may not be looked at."""
    query, key = query.detach().double(), key.detach().double()
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1).numpy()


def causal(length: int):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def split(rows, heads: int):
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


class Inputs:
    """The first argument, or the output, of the modules of a model whose name ends in one of `endings`."""

    def __init__(self, model: nn.Module, *endings: str) -> None:
        self.given: dict[str, list[Any]] = {}
        self.returned: dict[str, list[Any]] = {}
        for name, module in model.named_modules():
            if name.endswith(endings):
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str):
        def hook(_module: Any, arguments: Any, output: Any) -> None:
            self.given.setdefault(name, []).append(arguments[0] if arguments else None)
            self.returned.setdefault(name, []).append(output)

        return hook


@pytest.mark.parametrize("weights_wanted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_multihead_attention(weights_wanted: bool, masked: bool) -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    mask = causal(5) if masked else None
    with record(layer) as recording:
        layer(X, X, X, attn_mask=mask, is_causal=masked, need_weights=weights_wanted)
    query, key, _ = nn.functional.linear(X, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    (seen,) = recording.layers
    np.testing.assert_allclose(seen.weights, by_hand(split(query, 4), split(key, 4), mask), **CLOSE)
    assert (seen.name, seen.causal, seen.insight) == ("MultiheadAttention", masked, None)
    assert seen.weights.dtype == np.float32


@pytest.mark.parametrize("gradients", [False, True])
def test_torchs_encoder(gradients: bool) -> None:
    block = nn.TransformerEncoderLayer(16, 2, dim_feedforward=8, batch_first=True)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(gradients):
        expected = model(X, src_key_padding_mask=padding)
        inputs = Inputs(model, "norm1", "layers.0")  # whose hooks make torch decline its fast path
        with record(model) as recording:
            out = model(X, src_key_padding_mask=padding)
    torch.testing.assert_close(out, expected)
    sources = [X, inputs.returned["layers.0"][0]]
    for layer, seen, source in zip(model.layers, recording.layers, sources, strict=True):
        attention = layer.self_attn
        query, key, _ = nn.functional.linear(source, attention.in_proj_weight, attention.in_proj_bias).chunk(
            3, -1
        )
        expected_weights = by_hand(split(query, 2), split(key, 2), padding[:, None, None])
        np.testing.assert_allclose(seen.weights, expected_weights, **CLOSE)
    assert recording.names == ["layers.0.self_attn", "layers.1.self_attn"]


def test_own_modules_and_what_they_return() -> None:
    layer = SelfAttention(16, 4, num_kv_heads=2, causal=True)
    expected = layer(X)
    inputs = Inputs(layer, "q_proj", "k_proj")
    with record(layer) as recording:
        out = layer(X)
        out.sum().backward()
    assert torch.equal(out, expected) and layer.out_proj.weight.grad is not None
    query, key = (inputs.returned[name][0] for name in ("q_proj", "k_proj"))
    expected_weights = by_hand(split(query, 4), split(key, 2), causal(5))
    np.testing.assert_allclose(recording.layers[0].weights, expected_weights, **CLOSE)


class Mixed(nn.Module):
    """Attention of every kind, through functions, in two modules that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SelfAttention(16, 2), CrossAttention(16, 4)

    def forward(self, x):
        x = self.first(x)
        return self.second(self.first(x), x)


def test_calls_of_one_layer_are_told_apart() -> None:
    model = Mixed()
    with record(model, tokens=list("abcde")) as recording:
        model(X)
    assert [(layer.name, layer.call) for layer in recording.layers] == [
        ("first", 0),
        ("first", 1),
        ("second", 0),
    ]
    assert [layer.name for layer in recording.select(call=0)] == ["first", "second"]
    assert len(recording.select("first")) == 2 and recording.tokens == list("abcde")
    with pytest.raises(
        KeyError, match=r"no layer 'third' in call None; there are \['first', 'second'\] in 2"
    ):
        recording.select("third")


def test_other_models_are_not_seen() -> None:
    with pytest.raises(RuntimeError, match="saw no attention of the model"), record(Mixed()):
        Mixed()(X)


class Functional(nn.Module):
    """One call of `function` on (B, H, L, D)."""

    def __init__(self, function: Any, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *tensors):
        return self.function(*tensors, **self.options)


def by_name(query, key, value, **options: Any):
    """torch's function, looked up at the call."""
    return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


RULES: dict[str, dict[str, Any]] = {
    "window": {"causal": True, "window": (3, None)},
    "softcap": {"softcap": 2.0, "scale": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 1.0, 0.1]), "causal": "top_left"},
    "bias": {"bias": torch.linspace(-3, 3, 12 * 9).reshape(1, 1, 12, 9)},
    "mask": {"mask": torch.arange(12 * 9).reshape(12, 9) % 3 > 0},
    "lengths": {"kv_lengths": torch.tensor([9, 4]), "kv_starts": [0, 1], "query_lengths": [12, 7]},
    "segments": {"segment_ids": (torch.arange(24).reshape(2, 12) // 5, torch.arange(18).reshape(2, 9) // 4)},
    "offset": {"causal": True, "query_offset": torch.tensor([0, 3])},
    "dropout": {"dropout_p": 0.5},
    "rows": {"layout": "bshd"},
}


def operands(dtype=torch.float32):
    query = torch.randn(2, 4, 12, 8)
    key, value = torch.randn(2, 2, 2, 9, 8)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_attention(rule: str) -> None:
    options = dict(RULES[rule])
    tensors = operands()
    if rule == "rows":
        tensors = tuple(rows.transpose(1, 2) for rows in tensors)
    model = Functional(fa.attention, **options)
    torch.manual_seed(1)
    expected = model(*tensors)
    torch.manual_seed(1)
    with record(model) as recording:
        assert torch.equal(model(*tensors), expected)
    with record(model, dense_up_to=0, top_k=16) as sparse:
        model(*tensors)
    options.pop("dropout_p", None)
    oracle = reference.attention(*tensors, **options).weights
    np.testing.assert_allclose(recording.layers[0].weights, oracle, **CLOSE)
    assert recording.layers[0].causal == (rule in ("window", "alibi", "offset"))
    check_insight(sparse.layers[0], oracle)


def check_insight(layer, weights) -> None:
    """The insight is what one finds in the weights."""
    assert layer.weights is None
    keys, strongest = layer.insight.keys, layer.insight.weights
    assert keys.shape == strongest.shape == (*weights.shape[:3], 16)
    for index in np.ndindex(weights.shape[:3]):
        row, found = weights[index], keys[index]
        seen = found[found >= 0]
        assert len(seen) == min(16, (row > 0).sum()) == len(set(seen))
        np.testing.assert_allclose(strongest[index][: len(seen)], row[seen], **CLOSE)
        np.testing.assert_allclose(row[seen], np.sort(row)[::-1][: len(seen)], **CLOSE)
    sink = np.clip(1 - weights.sum(-1, keepdims=True), 0, 1) * weights.any(-1, keepdims=True)
    shares = np.concatenate([weights, sink], -1)
    logs = np.log(np.where(shares > 0, shares, 1))
    np.testing.assert_allclose(layer.insight.entropy, -(shares * logs).sum(-1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.insight.key_mass, weights.sum(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dense_up_to", [512, 0])
def test_sequences_behind_one_another(dense_up_to: int) -> None:
    query, key = torch.randn(10, 4, 8), torch.randn(12, 2, 8)
    starts_q, starts_k = [0, 4, 4, 10], [0, 5, 7, 12]
    model = Functional(fa.attention_varlen, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, causal=True)
    with record(model, dense_up_to=dense_up_to) as recording:
        model(query, key, key)
    expected = np.zeros((1, 4, 10, 12))
    for s in range(3):
        rows, keys = slice(*starts_q[s : s + 2]), slice(*starts_k[s : s + 2])
        heads = (x.transpose(0, 1)[None] for x in (query[rows], key[keys]))
        offset = (keys.stop - keys.start) - (rows.stop - rows.start)
        ahead = torch.arange(keys.stop - keys.start) > torch.arange(rows.stop - rows.start)[:, None] + offset
        expected[:, :, rows, keys] = by_hand(*heads, ahead)
    layer = recording.layers[0]
    expected = np.nan_to_num(expected)  # rows before the first key see nothing
    if dense_up_to:
        np.testing.assert_allclose(layer.weights, expected, **CLOSE)
    else:
        check_insight(layer, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_exact_whatever_the_dtype(dtype) -> None:
    query, key, value = operands(dtype)
    model = Functional(by_name)
    with record(model) as recording:
        model(query, key, value)
    weights = recording.layers[0].weights
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, by_hand(query, key), **CLOSE)
    np.testing.assert_allclose(weights.sum(-1), 1, **CLOSE)


def test_head_dimensions_that_no_kernel_reaches() -> None:
    query, key = torch.randn(2, 1, 1, 3, 600)
    model = Functional(by_name)
    with record(model) as recording:
        model(query, key, key)
    np.testing.assert_allclose(recording.layers[0].weights, by_hand(query, key), **CLOSE)


@pytest.mark.parametrize("patched", [False, True])
def test_torchs_function_patched_or_not(patched: bool) -> None:
    query, key, value = operands()
    model = Functional(by_name, is_causal=True)
    with fa.patch_sdpa(patched):
        expected = model(query, key, value)
        with record(model) as recording:
            assert torch.equal(model(query, key, value), expected)
    (seen,) = recording.layers  # once, though fastattn's attention is called within
    ahead = torch.arange(9) > torch.arange(12)[:, None]
    np.testing.assert_allclose(seen.weights, by_hand(query, key, ahead), **CLOSE)
    assert seen.causal


def test_autocast_rounds_what_is_looked_at() -> None:
    query, key, value = operands()
    model = Functional(by_name)
    with torch.autocast("cpu", torch.bfloat16), record(model) as recording:
        model(query, key, value)
    np.testing.assert_allclose(
        recording.layers[0].weights, by_hand(query.bfloat16(), key.bfloat16()), **CLOSE
    )


def test_dropout_is_left_out_of_weights_and_drawn_as_ever() -> None:
    layer = nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True)
    results = []
    for watch in (False, True):
        torch.manual_seed(3)
        if not watch:
            results.append(layer(X, X, X))
            continue
        with record(layer) as recording:
            results.append(layer(X, X, X))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    np.testing.assert_allclose(recording.layers[0].weights.sum(-1), 1, **CLOSE)


def test_blocks_are_nested_and_left_by_exceptions() -> None:
    model = Mixed()
    with pytest.raises(ZeroDivisionError), record(model):
        raise ZeroDivisionError
    with record(model) as outer:
        with record(model.first, dense_up_to=0) as inner:
            model(X)
        model.first(X)
    assert [layer.name for layer in outer.layers] == ["first", "first", "second", "first"]
    assert [layer.name for layer in inner.layers] == ["SelfAttention"] * 2
    assert inner.layers[0].insight is not None and outer.layers[0].weights is not None


def test_other_threads_are_not_seen() -> None:
    model = Mixed()
    with record(model) as recording:
        thread = threading.Thread(target=model, args=(X,))
        thread.start()
        thread.join()
        assert not recording.layers
        model.first(X)
    assert len(recording.layers) == 1


def test_tasks_are_seen_if_the_block_started_them() -> None:
    model = Mixed()

    async def call() -> None:
        await asyncio.sleep(0)
        model.first(X)

    async def calls() -> list[int]:
        before, counts = asyncio.create_task(call()), []
        with record(model) as recording:
            await before
            counts.append(len(recording.layers))
            await asyncio.create_task(call())
            counts.append(len(recording.layers))
        return counts

    assert asyncio.run(calls()) == [0, 1]


class _Llama:
    """The weights of a tiny Llama by hand: projections, rotary positions, grouped heads."""

    def __init__(self, model: Any) -> None:
        self.model, self.inputs = model, Inputs(model, "q_proj", "k_proj")

    def weights(self, layer: int, hidden) -> Any:
        config = self.model.config
        states = []
        for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            rows = self.inputs.returned[f"model.layers.{layer}.self_attn.{name}_proj"]
            states.append(self._turned(split(torch.cat(rows, 1).double(), heads)))
        return by_hand(*states, hidden)

    def _turned(self, states):
        half = states.shape[-1] // 2
        angles = torch.arange(states.shape[2])[:, None] * 10_000.0 ** -(torch.arange(half).double() / half)
        first, second = states.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("transformers", minversion="4.57")
    import transformers_models
    from fastattn.integrations import transformers as integration

    integration.register()
    return transformers_models


@pytest.mark.parametrize("implementation", ["sdpa", "fastattn"])
def test_bert_with_padding(models: Any, implementation: str) -> None:
    model = models.use(models.build(models.bert), implementation)
    inputs = Inputs(model, "self.query", "self.key")
    ids, mask = models.tokens("right")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        inputs.returned.clear()
        with record(model) as recording:
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert recording.names == [f"bert.encoder.layer.{at}.attention.self" for at in (0, 1)]
    for seen in recording.layers:
        query, key = (split(inputs.returned[f"{seen.name}.{end}"][0], 6) for end in ("query", "key"))
        np.testing.assert_allclose(seen.weights, by_hand(query, key, ~mask.bool()[:, None, None]), **CLOSE)
        assert not seen.causal


@pytest.mark.parametrize("cache", ["sdpa", "fastattn", "pages", "int8"])
def test_generation_step_by_step(models: Any, cache: str) -> None:
    from fastattn.integrations.transformers import PagedCache
    from test_transformers_cache import KEYWORD

    model = models.use(models.build(models.llama), "sdpa" if cache == "sdpa" else "fastattn")
    ids = models.tokens("none")[0]

    def generate() -> Any:
        given = {}
        if cache in ("pages", "int8"):
            given[KEYWORD] = PagedCache(model.config, 4, dtype=torch.int8 if cache == "int8" else None)
        return model.generate(
            ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, **given
        )

    expected, hand = generate(), _Llama(model)
    with record(model) as recording:
        assert torch.equal(generate(), expected)
    length = ids.shape[1]
    assert [layer.call for layer in recording.layers] == [0, 0, 1, 1, 2, 2, 3, 3]
    for at, name in enumerate(recording.names):
        whole = hand.weights(at, causal(length + 3))
        for seen in recording.select(name):
            rows = slice(length) if not seen.call else slice(length + seen.call - 1, length + seen.call)
            bound = {"rtol": 0, "atol": 0.05} if cache == "int8" and seen.call else {"rtol": 0, "atol": 5e-6}
            np.testing.assert_allclose(seen.weights, whole[:, :, rows, : rows.stop], **bound)
            np.testing.assert_allclose(seen.weights.sum(-1), 1, **CLOSE)
            assert seen.causal


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "t5", "bart", "modern_bert"])
def test_what_eager_attention_returns(models: Any, name: str) -> None:
    """Softcap and windows, sinks, biases, cross-attention, windows to both sides; with padding."""
    model = models.build(getattr(models, name))
    inputs = models.sources(model, "right")
    with torch.no_grad():
        out = models.use(model, "eager")(**inputs, output_attentions=True)
        with record(models.use(model, "fastattn")) as recording:
            model(**inputs)
    expected = list(out.get("attentions") or out.get("encoder_attentions"))
    for own, cross in zip(out.get("decoder_attentions", ()), out.get("cross_attentions", ()), strict=True):
        expected += [own, cross]
    for seen, weights in zip(recording.layers, expected, strict=True):
        looking = seen.weights.any(-1)  # eager attention spreads what may see nothing over everything
        np.testing.assert_allclose(seen.weights[looking], weights.numpy()[looking], **CLOSE)


@pytest.mark.parametrize("backend", ["cpu", "math", "reference"])
def test_caches_in_pages(backend: str) -> None:
    """The weights are those that make the output of the values that the cache holds."""
    query, pages = torch.randn(2, 2, 4, 16), torch.randn(2, 8, 4, 2, 16)
    table = torch.tensor([[0, 2, 5, 99], [1, 3, -7, -1]])  # what is beyond the length is nobody's page
    rotary = {"rotary_cos": torch.rand(20, 8), "rotary_sin": torch.rand(20, 8)}
    new = dict(zip(("new_key", "new_value"), torch.randn(2, 2, 2, 2, 16), strict=True))
    model = Functional(
        fa.attention_with_kvcache, cache_seqlens=[7, 3], block_table=table, **rotary, **new, backend=backend
    )
    with record(model) as recording:
        out = model(query, *pages)
    weights = torch.from_numpy(recording.layers[0].weights)
    assert weights.shape == (2, 4, 2, 9) and not weights[1, :, :, 5:].any()
    values = torch.stack([pages[1, row.clamp(0, 7)].flatten(0, 1)[:9] for row in table])
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, values.repeat_interleave(2, 2)), out)


@pytest.mark.filterwarnings("ignore")  # of torch, on vmap and nested tensors
def test_tensors_without_numbers_are_refused() -> None:
    rows = torch.randn(2, 1, 2, 3, 8)
    for model in (Functional(fa.attention), Functional(by_name)):
        with (
            pytest.raises(NotImplementedError, match=r"in a transform of torch\.func have none"),
            record(model),
        ):
            torch.func.vmap(model)(rows, rows, rows)
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="cannot be looked into: nested of"), record(model):
        model(*[nested.transpose(1, 2)] * 3)


def test_eager_attention_is_refused(models: Any) -> None:
    model = models.use(models.build(models.bert), "eager")
    with (
        pytest.raises(ValueError, match=r"model must not use eager.*set_attn_implementation\('sdpa'\)"),
        record(model),
    ):
        pass


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.* got str"), record("model"):
        pass


def test_compiled_and_scripted_models_are_refused() -> None:
    compiled, scripted, in_place = torch.compile(Mixed()), torch.jit.script(nn.Linear(2, 2)), Mixed()
    in_place.first.compile()
    for model, message in (
        (compiled, "got a compiled module ''"),
        (in_place, "got a compiled module 'first'"),
        (scripted, "got a scripted module ''"),
    ):
        with pytest.raises(TypeError, match=message), record(model):
            pass


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"dense_up_to": -1}, ValueError, "dense_up_to must be at least 0, got -1"),
        ({"dense_up_to": 2.0}, TypeError, "dense_up_to must be an integer, got float"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": True}, TypeError, "top_k must be an integer, got bool"),
    ],
)
def test_numbers_are_checked(option: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message), viz.record(Mixed(), **option):
        pass


def test_a_patch_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = nn.MultiheadAttention(16, 4, batch_first=True), []
    torchs = nn.functional.multi_head_attention_forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return torchs(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "multi_head_attention_forward", theirs)
        with record(layer) as recording:
            layer(X, X, X)
        assert calls and len(recording.layers) == 1
        assert nn.functional.multi_head_attention_forward is theirs


def test_a_subclass_of_tensor_is_seen_once() -> None:
    class Marked(torch.Tensor):
        pass

    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    marked = X.as_subclass(Marked)
    with record(layer) as recording:
        layer(marked, marked, marked)
    assert len(recording.layers) == 1


def test_a_task_that_outlasts_the_block_is_not_recorded() -> None:
    layer, other = SelfAttention(16, 4), SelfAttention(16, 4)

    async def later(go: asyncio.Event) -> None:
        await go.wait()
        layer(X)

    async def main() -> None:
        go = asyncio.Event()
        with record(layer) as first:
            task = asyncio.create_task(later(go))
            layer(X)
        with record(other) as second:
            go.set()
            await task
        assert (len(first.layers), len(second.layers)) == (1, 0)

    with pytest.raises(RuntimeError, match="no attention"):  # of the second block
        asyncio.run(main())


@pytest.mark.parametrize("dense_up_to", [0, 512])
@pytest.mark.parametrize("rule", ["mask", "bias", "segment_ids"])
def test_a_cache_with_room_and_another_rule(rule: str, dense_up_to: int) -> None:
    """What has an axis of keys has all of it, the room for more as well."""
    query, key = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 16, 8)
    lengths = torch.tensor([10, 8])
    numbers = torch.randn(2, 1, 3, 16)
    options: dict[str, Any] = {"causal": True, "kv_lengths": lengths, "query_offset": lengths - 3}
    options[rule] = {
        "mask": numbers > -1,
        "bias": numbers,
        "segment_ids": (torch.zeros(2, 3).long(), (torch.arange(16) % 5 == 1).long().expand(2, -1)),
    }[rule]

    class Model(nn.Module):
        def forward(self) -> Any:
            return fa.attention(query, key, key, **options)

    model = Model()
    with record(model, dense_up_to=dense_up_to, top_k=16) as recording:
        model()
    _, weights = fa.attention(query, key, key, **options, return_weights=True)
    (seen,) = recording.layers
    if dense_up_to:
        np.testing.assert_allclose(seen.weights, weights.numpy(), **CLOSE)
    else:
        np.testing.assert_allclose(seen.insight.key_mass, weights.sum(2).numpy(), **CLOSE)
    assert seen.causal


def test_a_head_that_looks_ahead_a_little_is_not_causal() -> None:
    """Even where its strongest key lies behind."""
    query = torch.tensor([[1.0], [1.0]])[None, None]
    key = torch.tensor([[9.0], [1.0]])[None, None]

    class Model(nn.Module):
        def forward(self) -> Any:
            return fa.attention(query, key, key)

    model = Model()
    with record(model, dense_up_to=0, top_k=1) as recording:
        model()
    assert not recording.layers[0].causal


def test_tokens_are_a_list() -> None:
    with pytest.raises(TypeError, match="one string"), record(SelfAttention(16, 4), tokens="abcde"):
        pass
    layer = SelfAttention(16, 4)
    with record(layer, dense_up_to=0, top_k=np.int64(2)) as recording:
        layer(X)
    assert recording.layers[0].insight.keys.shape[-1] == 2
