"""Generation over pages gives what eager attention gives over its own cache."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.57")

import fastattn as fa  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402
from fastattn.integrations import transformers_cache  # noqa: E402
from fastattn.integrations.transformers import PagedCache  # noqa: E402
from transformers_models import (  # noqa: E402
    BATCH,
    DECODERS,
    LENGTH,
    PADDING,
    bart,
    build,
    llama,
    llama4,
    model_name,
    sources,
    tokens,
    use,
)

FIVE = int(transformers.__version__.split(".")[0]) >= 5
KEYWORD = "cache" if FIVE else "past_key_values"  # which 5 takes, too, and warns of
NEW = 12


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def prompt(padding: str = "none") -> dict[str, Any]:
    ids, mask = tokens(padding)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def generate(model, implementation: str, cache=None, **inputs: Any):
    given = {} if cache is None else {KEYWORD: cache}
    return use(model, implementation).generate(
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **(inputs | given),
    )


def agree(actual, expected) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=2e-5, atol=5e-5)


@pytest.fixture
def reads(monkeypatch):
    """How often pages were attended to where they lie, and how often copied in one piece."""
    counts = {"pages": 0, "copies": 0}

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    attend = counting("pages", transformers_cache.attention_with_kvcache)
    monkeypatch.setattr(transformers_cache, "attention_with_kvcache", attend)
    dense = counting("copies", transformers_cache._Pages.dense)
    monkeypatch.setattr(transformers_cache._Pages, "dense", dense)
    return counts


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("make", DECODERS, ids=model_name)
def test_greedy_text_is_that_of_eager(make, padding, reads):
    model = build(make)
    cache = PagedCache(model.config, page_size=5)
    agree(generate(model, "fastattn", cache, **prompt(padding)), generate(model, "eager", **prompt(padding)))
    assert cache.get_seq_length() == LENGTH + NEW - 1 and cache.batch_size == BATCH
    chunks = make is llama4  # a mask of their own, which reads a copy of all that was given, padding included
    tokens_of = [LENGTH + NEW - 1 - (0 if chunks else count) for count in PADDING[padding]]
    usage = cache.usage()
    assert usage.tokens == sum(tokens_of) and usage.used_pages == sum(-(-count // 5) for count in tokens_of)
    assert usage.pages == 2 * BATCH * 5  # made for the prompt, with as much again for what follows
    if not chunks:
        assert reads == {"pages": model.config.num_hidden_layers * (NEW - 1), "copies": 0}


def test_other_implementations_get_copies(reads):
    model = build(llama)
    cache = PagedCache(model.config, page_size=5)
    agree(generate(model, "eager", cache, **prompt("left")), generate(model, "eager", **prompt("left")))
    assert reads["pages"] == 0 and reads["copies"] > 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_quantised(dtype, reads):
    """As near to the plain cache as its numbers: a step off in the last digit, no more."""
    model = build(llama)
    ids = prompt()["input_ids"]
    caches = [PagedCache(model.config, page_size=5, dtype=kind) for kind in (None, dtype)]
    use(model, "fastattn")
    with torch.no_grad():
        for cache in caches:
            model(input_ids=ids[:, :-3], **{KEYWORD: cache})
        plain, quantised = (model(input_ids=ids[:, -3:], **{KEYWORD: cache}).logits for cache in caches)
    error = ((quantised - plain).norm() / plain.norm()).item()
    assert 1e-4 < error < {torch.int8: 0.02, torch.float8_e4m3fn: 0.06, torch.float8_e5m2: 0.12}[dtype]
    assert caches[1].usage().nbytes < caches[0].usage().nbytes / 2.5
    assert reads == {"pages": 2 * model.config.num_hidden_layers, "copies": 0}


def test_an_autocast_of_the_model_is_that_of_the_cache(reads):
    model = build(llama)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        cache = PagedCache(model.config)
        actual = generate(model, "fastattn", cache, **prompt())
        expected = generate(model, "fastattn", **prompt())
    assert cache._pages.pool.dtype == "bfloat16" and reads["copies"] == 0
    torch.testing.assert_close(actual.logits[1], expected.logits[1], rtol=0.05, atol=0.05)


def test_beams_share_pages():
    model = build(llama)
    cache = PagedCache(model.config, page_size=5)
    options = {"num_beams": 3, "num_return_sequences": 2}
    actual = generate(model, "fastattn", cache, **prompt("left") | options)
    assert torch.equal(actual.sequences, generate(model, "eager", **prompt("left") | options).sequences)
    usage = cache.usage()
    assert usage.sequences == 3 * BATCH and usage.shared_pages > 0
    assert usage.used_pages < 3 * BATCH * 7


def test_tokens_are_taken_back():
    """By guesses that failed, of tokens that stood in the prompt before."""
    model = build(llama)
    inputs = {name: rows[1:2] for name, rows in prompt().items()}
    cache = PagedCache(model.config, page_size=5)
    actual = generate(model, "fastattn", cache, **inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(actual.sequences, generate(model, "eager", **inputs).sequences)


def test_crop_is_that_of_transformers():
    model = use(build(llama), "fastattn")
    ids = prompt()["input_ids"]
    cache, whole = (PagedCache(model.config, page_size=5, num_pages=20) for _ in range(2))
    with torch.no_grad():
        model(input_ids=ids[:, :17], **{KEYWORD: whole})
        model(input_ids=ids, **{KEYWORD: cache})
        cache.crop(17 - LENGTH)
        assert cache.get_seq_length() == 17 and cache.usage() == whole.usage()
        rows = [model(input_ids=ids[:, 17:], **{KEYWORD: kept}).logits for kept in (cache, whole)]
    assert torch.equal(*rows)
    if FIVE:
        cache.crop(0)
        assert cache.get_seq_length() == LENGTH
        with pytest.raises(ValueError, match="tokens_to_remove must be negative, or 0, got 3"):
            cache.crop(3)
    else:
        cache.crop(30)
        cache.crop(3)
        assert cache.get_seq_length() == 3
    cache.crop(-100)
    assert cache.get_seq_length() == 0 and cache.usage().used_pages == 0


def test_a_conversation_goes_on(reads):
    model = build(llama)
    cache = PagedCache(model.config, page_size=5)
    first = generate(model, "fastattn", cache, **prompt()).sequences
    longer = torch.cat([first, tokens()[0][:, :4]], 1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    before = reads["pages"]
    agree(generate(model, "fastattn", cache, **inputs), generate(model, "eager", **inputs))
    assert reads == {"pages": before + model.config.num_hidden_layers * NEW, "copies": 0}


def test_answers_share_their_prompt():
    model = use(build(llama), "fastattn")
    ids = prompt()["input_ids"][:1]
    shared = PagedCache(model.config, page_size=5)
    with torch.no_grad():
        model(input_ids=ids, **{KEYWORD: shared})
    expected = shared.usage()
    for question in (5, 9):
        asked = torch.cat([ids, torch.full((1, 3), question)], 1)
        inputs = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
        cache = copy.deepcopy(shared)
        agree(generate(model, "fastattn", cache, **inputs), generate(model, "eager", **inputs))
        assert cache.usage().shared_pages == LENGTH // 5 and shared.get_seq_length() == LENGTH
        del cache
        assert shared.usage() == expected


def test_a_prompt_is_saved():
    """Without what other caches have in its pool; both go on apart."""
    model = use(build(llama), "fastattn")
    ids = prompt()["input_ids"][:1]
    cache = PagedCache(model.config, page_size=5)
    with torch.no_grad():
        model(input_ids=ids, **{KEYWORD: cache})
    other = copy.deepcopy(cache)  # a fork in the same pool
    saved = pickle.dumps(cache)
    asked = torch.cat([ids, torch.full((1, 3), 5)], 1)
    inputs = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
    want = generate(model, "fastattn", other, **inputs)
    restored = pickle.loads(saved)
    assert type(restored) is PagedCache and restored.get_seq_length() == LENGTH
    assert restored.usage().sequences == 1 and restored.usage().shared_pages == 0
    agree(generate(model, "fastattn", restored, **inputs), want)
    assert cache.get_seq_length() == LENGTH
    empty = pickle.loads(pickle.dumps(PagedCache(model.config)))
    agree(generate(model, "fastattn", empty, **inputs), want)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_prompt_in_parts_with_padding(size, reads):
    """Parts may be all padding for some sequences, and end in the middle of it."""
    model = build(llama)
    ids, mask = tokens("left")
    logits = {}
    for implementation, cache in (("eager", None), ("fastattn", PagedCache(model.config, page_size=3))):
        use(model, implementation)
        with torch.no_grad():
            cache = transformers.DynamicCache() if cache is None else cache
            for end in range(size, LENGTH + size, size):
                part, seen = ids[:, end - size : end], mask[:, :end]
                positions = (seen.cumsum(1) - 1).clamp(min=0)[:, end - size :]
                given = {"input_ids": part, "attention_mask": seen, "position_ids": positions}
                logits.setdefault(implementation, []).append(model(**given, **{KEYWORD: cache}).logits)
    actual, expected = (torch.cat(logits[name], 1)[mask.bool()] for name in ("fastattn", "eager"))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    assert cache.usage().tokens == mask.sum() and reads["copies"] == 0


def test_padding_that_comes_later_is_masked_in_a_copy(reads):
    """A second batch of prompts goes on where the first ended, with padding between."""
    model = build(llama)
    ids, mask = tokens("left")
    ids, mask = torch.cat([ids, ids], 1), torch.cat([mask, mask], 1)
    logits = []
    for implementation, cache in (
        ("eager", transformers.DynamicCache()),
        ("fastattn", PagedCache(model.config, page_size=5)),
    ):
        use(model, implementation)
        with torch.no_grad():
            for part in (slice(0, LENGTH), slice(LENGTH, None)):
                given = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop]}
                out = model(**given, **{KEYWORD: cache}).logits
        logits.append(out[mask[:, LENGTH:].bool()])
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-5, atol=2e-5)
    assert reads["copies"] > 0 and cache.usage().tokens == mask.sum() + sum(PADDING["left"])


@torch.no_grad()
def steps(model, caches, *parts: dict[str, Any]) -> list[torch.Tensor]:
    """Logits of the last part's last tokens, from each cache."""
    return [[model(**part, **{KEYWORD: cache}).logits[:, -1] for part in parts][-1] for cache in caches]


def test_padding_that_was_stored_is_masked_in_a_copy(reads):
    """Under eager attention the prompt is stored whole; what follows may be computed by either."""
    model = use(build(llama), "eager")
    ids, mask = tokens("left")
    caches = [transformers.DynamicCache(), PagedCache(model.config, page_size=5)]
    steps(model, caches, {"input_ids": ids, "attention_mask": mask})
    longer = {"input_ids": ids[:, :1], "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
    reads["copies"] = 0
    torch.testing.assert_close(*steps(use(model, "fastattn"), caches, longer), rtol=2e-5, atol=2e-5)
    assert reads["copies"] > 0 and reads["pages"] == 0


def test_layers_of_one_model_may_differ():
    """One that looks at its keys stores them with their padding; the next does so, too."""
    _, mask = tokens("left")
    cache = PagedCache(llama().config, page_size=5)
    rows = torch.randn(BATCH, 2, LENGTH, 16, generator=torch.Generator().manual_seed(3))
    for part in (slice(0, LENGTH - 2), slice(LENGTH - 2, LENGTH)):
        seen = mask[:, : part.stop].bool()
        positions = torch.arange(part.start, part.stop)
        where = (
            {"q_length": len(positions), "q_offset": part.start} if FIVE else {"cache_position": positions}
        )
        rule = integration.make_mask(BATCH, kv_length=part.stop, attention_mask=seen, **where)
        for layer in (0, 1):
            keys, values = cache.update(rows[:, :, part], -rows[:, :, part], layer)
            if layer == 0:
                assert torch.equal(keys + 0, rows[:, :, : part.stop])
                continue
            call = (torch.nn.Module().eval(), rows[:, :, part])
            out, _ = integration.attention_forward(*call, keys, values, rule)
            whole = rows[:, :, : part.stop]
            expected, _ = integration.attention_forward(*call, whole, -whole, rule)
            torch.testing.assert_close(out, expected)
    for layer in cache.layers:
        assert torch.equal(layer.keys, rows) and torch.equal(layer.values, -rows)


def test_padding_goes_with_its_sequence(reads):
    model = use(build(llama), "fastattn")
    ids, mask = tokens("left")
    caches = [transformers.DynamicCache(), PagedCache(model.config, page_size=5)]
    steps(model, caches, {"input_ids": ids, "attention_mask": mask})
    order = torch.tensor([2, 2, 0])
    for cache in caches:
        cache.reorder_cache(order)
    longer = torch.nn.functional.pad(mask[order], (0, 1), value=1)
    torch.testing.assert_close(
        *steps(model, caches, {"input_ids": ids[:, :1], "attention_mask": longer}), rtol=2e-5, atol=2e-5
    )
    assert reads["copies"] == 0 and caches[1].usage().shared_pages == 3


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_cropped_cache_begins_anew(padding, reads):
    model = use(build(llama), "fastattn")
    ids, mask = tokens("left")
    cache, other = PagedCache(model.config, page_size=5), PagedCache(model.config, page_size=5)
    steps(model, [cache], {"input_ids": ids, "attention_mask": mask})
    cache.crop(-LENGTH)
    prompt_again = prompt(padding)
    longer = torch.nn.functional.pad(prompt_again["attention_mask"], (0, 1), value=1)
    follow = {"input_ids": ids[:, :1], "attention_mask": longer}
    assert torch.equal(*steps(model, [cache, other], prompt_again, follow))
    assert reads["copies"] == 0


def test_padding_that_was_left_out_stays_hidden():
    model = use(build(llama), "fastattn")
    ids, mask = tokens("left")
    cache = PagedCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, **{KEYWORD: cache})
        with pytest.raises(
            ValueError,
            match=r"attention_mask must hide the padding .*, got tokens from 0 of sequence 0, which b",
        ):
            model(input_ids=ids[:, :1], **{KEYWORD: cache})


def test_the_decoder_of_an_encoder():
    model = build(bart)
    inputs = {n: x for n, x in sources(model).items() if "decoder" not in n and x is not None}
    cache = transformers.EncoderDecoderCache(PagedCache(model.config, 5), transformers.DynamicCache())
    agree(generate(model, "fastattn", cache, **inputs), generate(model, "eager", **inputs))


def test_layers_can_be_looked_at():
    model = use(build(llama), "eager")  # which computes the same, to the bit, from the same keys
    paged, dynamic = PagedCache(model.config, page_size=5), transformers.DynamicCache()
    assert paged.layers[0].keys is None and not paged.is_initialized and paged.usage() is None
    with torch.no_grad():
        for cache in (paged, dynamic):
            for part in prompt()["input_ids"].split(9, 1):
                model(input_ids=part, **{KEYWORD: cache})
    for ours, theirs in zip(paged.layers, dynamic.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    for cache in (paged, dynamic):
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([4, 0]))
    assert torch.equal(paged.layers[1].keys, dynamic.layers[1].keys) and paged.batch_size == 2
    assert torch.equal(copy.deepcopy(paged).layers[1].values, dynamic.layers[1].values)
    assert repr(paged).startswith(
        f"PagedCache(length={LENGTH}, PagedKVCache(2 sequences, {2 * LENGTH} tokens"
    )


# --- refusals ----------------------------------------------------------------------------------------------


def test_rows_are_kept_in_pages_alone():
    model, kept = use(build(llama), "fastattn"), []

    class Watched(PagedCache):
        def update(self, key_states, value_states, *arguments: Any, **keywords: Any) -> Any:
            kept.extend((weakref.ref(key_states), weakref.ref(value_states)))
            return super().update(key_states, value_states, *arguments, **keywords)

    cache = Watched(model.config)
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
    assert kept and not any(rows() is not None for rows in kept)


def test_a_pool_that_never_grows():
    model = build(llama)
    inputs = {name: rows[:1] for name, rows in prompt().items()}
    cache = PagedCache(model.config, page_size=5, num_pages=6)
    with pytest.raises(fa.OutOfPagesError, match="1 needed, 0 of 6 free"):
        generate(model, "fastattn", cache, **inputs)
    assert cache.get_seq_length() == 30
    cache.reset()
    assert cache.usage().free_pages == 6 and cache.get_seq_length() == 0 and cache.batch_size == -1
    with pytest.raises(fa.OutOfPagesError, match="needed, 6 of 6 free"):
        generate(model, "fastattn", cache, **prompt())
    with torch.no_grad():
        model(**inputs, **{KEYWORD: cache})  # of another batch, which is the first that there was room for
    assert cache.batch_size == 1 and cache.get_seq_length() == LENGTH
    roomy = PagedCache(model.config, page_size=5, num_pages=7)
    agree(generate(model, "fastattn", roomy, **inputs), generate(model, "eager", **inputs))
    assert roomy.usage().free_pages == 0


def test_a_pool_that_has_no_memory_to_grow(monkeypatch):
    def grow(*_: Any) -> None:
        raise MemoryError

    cache, rows = PagedCache(llama().config, page_size=2), torch.ones(1, 2, 3, 8)
    cache.update(rows, rows, 0)
    monkeypatch.setattr(fa.PagedKVCache, "grow", grow)
    with pytest.raises(MemoryError):
        cache.update(*[rows.repeat(1, 1, 9, 1)] * 2, 0)
    assert cache.get_seq_length() == 3
    cache.update(rows, rows, 0)
    assert torch.equal(cache.layers[0].keys, rows.repeat(1, 1, 2, 1))


def test_copies_from_before_the_first_call_are_apart():
    cache = PagedCache(llama().config, page_size=2)
    other, rows = copy.deepcopy(cache), torch.ones(1, 2, 3, 8)
    for made in (cache, other):
        made.update(rows, rows, 0)
    usage = cache.usage()
    del made, other
    gc.collect()
    assert cache.usage() == usage and usage.sequences == 1
    cache.update(rows, rows, 0)
    assert cache.get_seq_length() == 6


def test_layers_go_together():
    cache = PagedCache(llama().config)
    cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match=r"layers of one size, .* \(2, 8, 8\), got \(2, 9, 8\)"):
        cache.update(torch.ones(1, 2, 3, 9), torch.ones(1, 2, 3, 8), 1)
    assert cache.get_seq_length(1) == 0
    for name in ("reset", "reorder_cache", "crop", "batch_repeat_interleave", "offload"):
        with pytest.raises(NotImplementedError, match="call this method of the cache"):
            getattr(cache.layers[0], name)(torch.zeros(1))


def test_another_batch_is_refused():
    model = use(build(llama), "fastattn")
    cache = PagedCache(model.config)
    with torch.no_grad():
        model(input_ids=prompt()["input_ids"], **{KEYWORD: cache})
        with pytest.raises(ValueError, match="must have the cache's batch of 3 sequences, got 2"):
            model(input_ids=prompt()["input_ids"][:2], **{KEYWORD: cache})
        assert cache.get_seq_length() == LENGTH


def test_gradients_are_refused():
    model = use(build(llama), "fastattn")
    with pytest.raises(
        RuntimeError, match=r"PagedCache keeps no graph: call the model under torch.no_grad\(\)"
    ):
        model(input_ids=prompt()["input_ids"], **{KEYWORD: PagedCache(model.config)})


def test_layers_that_keep_something_else_are_refused():
    config = llama().config
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"got layers of type \['linear_attention'\]"):
        PagedCache(config)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"page_size": 0}, ValueError, "page_size must be at least 1, got 0"),
        ({"num_pages": 0}, ValueError, "num_pages must be at least 1, got 0"),
        ({"dtype": "int8"}, TypeError, "dtype must be a torch.dtype, got 'int8'"),
        ({"config": 7}, TypeError, "config must be that of a model, model.config, got int"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PagedCache(**{"config": llama().config, **arguments})


@pytest.mark.parametrize("tokens, page_size", [(1, 128), (1023, 128), (1024, 256), (4095, 512), (9000, 1024)])
def test_pages_are_a_quarter_of_the_prompt(tokens: int, page_size: int) -> None:
    config = llama().config
    rows = torch.zeros(1, 2, tokens, 8)
    for options, expected in (({}, page_size), ({"num_pages": 80}, 128), ({"page_size": 7}, 7)):
        cache = PagedCache(config, **options)
        cache.update(rows, rows, 0)
        assert f"of {expected}, float32" in repr(cache)
