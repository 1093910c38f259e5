"""Cached calls equal one full pass: in chunks, token by token, drafted and rolled back, in ragged batches."""

import pytest
import torch
from torch import Tensor

from alloy.errors import RequestError
from alloy.models.base import CausalLM
from alloy.models.cache import DenseCache
from alloy.models.configs import AttentionConfig, HybridConfig, MambaConfig
from alloy.models.registry import MODELS
from tests.models.zoo import CONFIGS, build, random_tokens

SEQ = 19


def run(model: CausalLM, cache: DenseCache, tokens: Tensor) -> Tensor:
    logits = model(tokens, cache=cache).logits
    assert logits is not None
    return logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_steps_follow_a_model_that_was_moved() -> None:
    """A move or cast may put other weights where the old ones lay, which no counter of changes shows."""
    model, tokens = build("dense"), random_tokens(2, 4)
    for _ in range(2):
        cache = model.new_cache(batch=2)
        parts = [run(model, cache, tokens[:, i : i + 1]) for i in range(4)]
        close(torch.cat(parts, 1), model(tokens).logits)
        for p in model.parameters():
            p.data.mul_(1.5)
        model.float()


def test_every_registered_kind_is_here() -> None:
    """The tests below and in test_layout.py run over CONFIGS."""
    assert {config.kind for config in CONFIGS.values()} == set(MODELS.names())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_chunks_steps_and_drafts_give_the_full_pass(name: str) -> None:
    """Any cut of the row, single steps, and drafts of which some are taken back give the logits of one pass."""
    model, tokens = build(name), random_tokens(2, SEQ)
    whole = model(tokens).logits
    for cut in (1, 2, 7, SEQ - 1):
        cache = model.new_cache(batch=2)
        close(torch.cat([run(model, cache, tokens[:, :cut]), run(model, cache, tokens[:, cut:])], 1), whole)
    cache = model.new_cache(batch=2)
    close(torch.cat([run(model, cache, tokens[:, i : i + 1]) for i in range(SEQ)], 1), whole)
    assert cache.lengths.tolist() == [SEQ, SEQ]

    cache = model.new_cache(batch=2)
    run(model, cache, tokens[:, :3])
    held = torch.tensor([3, 3])
    index = torch.arange(4)
    for accepted in ([2, 4], [0, 1], [4, 0], [1, 3]):
        # rows advance differently; every draft is right for its first accepted tokens and wrong after them
        counts = torch.tensor(accepted)
        right = tokens.gather(1, held[:, None] + index)
        draft = torch.where(index < counts[:, None], right, (right + 1) % model.config.vocab)
        with cache.drafting():
            logits = run(model, cache, draft)
        for row, count in enumerate(accepted):
            close(logits[row, :count], whole[row, held[row] : held[row] + count])
        cache.accept(counts)
        held = held + counts
        assert torch.equal(cache.lengths, held)
    ends = tokens.gather(1, held[:, None])
    close(run(model, cache, ends)[:, 0], whole[torch.arange(2), held])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_filling_the_cache_alone(name: str) -> None:
    """`only_cache` leaves what a whole call leaves, and computes no block that keeps nothing behind the last that does."""
    model, tokens = build(name), random_tokens(2, SEQ)
    whole, filled = model.new_cache(batch=2), model.new_cache(batch=2)
    run(model, whole, tokens[:, :9])
    ran: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.layers)]
    out = model(tokens[:, :9], cache=filled, only_cache=True)
    for hook in hooks:
        hook.remove()
    kept = [i for i, mixer in enumerate(model.cached_mixers()[0]) if isinstance(mixer, MambaConfig | AttentionConfig)]
    assert ran == list(range(max(kept) + 1))
    assert out.logits is None
    assert out.last_hidden.shape[1] == 0
    close(run(model, filled, tokens[:, 9:]), run(model, whole, tokens[:, 9:]))
    with pytest.raises(RequestError, match="only_cache"):
        model(tokens, only_cache=True)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_ragged_cache_equals_single_rows(name: str) -> None:
    """Rows of other lengths, padded on the left or right, then decoded together with an idle row."""
    model, tokens = build(name), random_tokens(3, SEQ)
    whole = model(tokens).logits
    prompts = (5, 11, 8)
    for left in (False, True):
        rows = torch.zeros(3, 11, dtype=torch.int64)
        documents = torch.full((3, 11), -1)
        for row, n in enumerate(prompts):
            span = slice(11 - n, 11) if left else slice(0, n)
            rows[row, span], documents[row, span] = tokens[row, :n], 0
        cache = model.new_cache(batch=3, capacity=4)
        logits = model(rows, cache=cache, documents=documents, logits="last").logits
        for row, n in enumerate(prompts):
            close(logits[row, 0], whole[row, n - 1])
        for step in range(3):
            at = torch.tensor(prompts) + step
            # row 1 idles in the second step and takes its token in the third
            active = torch.tensor([[0], [-1 if step == 1 else 0], [0]])
            at[1] -= int(step == 2)
            logits = model(tokens.gather(1, at[:, None]), cache=cache, documents=active).logits
            for row in range(3):
                if active[row] == 0:
                    close(logits[row, 0], whole[row, at[row]])
        assert cache.lengths.tolist() == [8, 13, 11]


@pytest.mark.parametrize("name", ["latent_mtp", "puzzle", "qwen3"])
@torch.no_grad()
def test_snapshot_select_clone_reset(name: str) -> None:
    """A restored, selected or cloned row goes on as if nothing had happened."""
    model, tokens = build(name), random_tokens(3, SEQ)
    whole = model(tokens).logits
    cache = model.new_cache(batch=3)
    run(model, cache, tokens[:, :6])
    saved = cache.snapshot()
    copy = cache.clone()
    before = cache.bytes()
    run(model, cache, tokens[:, 6:9])
    assert cache.bytes() == before
    close(run(model, copy, tokens[:, 6:9]), whole[:, 6:9])

    cache.select([2, 0])
    close(run(model, cache, tokens[[2, 0], 9:11]), whole[[2, 0], 9:11])
    cache.reset([1])
    assert cache.lengths.tolist() == [11, 0]
    cache.restore(cache.snapshot([0]))
    assert cache.lengths.tolist() == [11, 11]

    other = model.new_cache(batch=2)
    row = copy.snapshot([1])
    other.restore(row)
    close(run(model, other, tokens[[1, 1], 9:12]), whole[[1, 1], 9:12])
    other.reset()
    close(run(model, other, tokens[:2, :5]), whole[:2, :5])
    copy.restore(saved)
    close(run(model, copy, tokens[:, 6:9]), whole[:, 6:9])
    copy.reset([0])
    close(run(model, copy, torch.stack([tokens[0, :2], tokens[1, 9:11], tokens[2, 9:11]]))[0], whole[0, :2])


@torch.no_grad()
def test_truncate_is_for_attention_only() -> None:
    """Keys can be forgotten, a recurrent state cannot."""
    model, tokens = build("llama"), random_tokens(2, SEQ)
    whole, cache = model(tokens).logits, model.new_cache(batch=2)
    run(model, cache, tokens[:, :9])
    cache.truncate(torch.tensor([4, 4]))
    close(run(model, cache, tokens[:, 4:7]), whole[:, 4:7])
    with pytest.raises(RequestError, match="rows hold"):
        cache.truncate(torch.tensor([4, 8]))
    cache = build("dense").new_cache(batch=2)
    run(build("dense"), cache, tokens[:, :9])
    with pytest.raises(RequestError, match="recurrent states cannot be truncated"):
        cache.truncate(torch.tensor([4, 4]))


@torch.no_grad()
def test_cache_misuse_is_refused() -> None:
    """Wrong row count, packed rows, MTP with a cache, and drafts accepted beyond their length."""
    model, tokens = build("latent_mtp"), random_tokens(2, 5)
    with pytest.raises(RequestError, match=r"state_dtype = torch\.int8; a recurrent state is floating point"):
        model.new_cache(batch=2, state_dtype=torch.int8)
    with pytest.raises(RequestError, match="made for 3"):
        model(tokens, cache=model.new_cache(batch=3))
    packed = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    with pytest.raises(RequestError, match="one document per row"):
        model(tokens, cache=model.new_cache(batch=2), documents=packed)
    with pytest.raises(RequestError, match="mtp_step"):
        model(tokens, cache=model.new_cache(batch=2), return_mtp=True)
    cache = model.new_cache(batch=2)
    with cache.drafting():
        model(tokens, cache=cache)
    with pytest.raises(RequestError, match="6 tokens, but 5"):
        cache.accept(torch.tensor([6, 1]))


@pytest.mark.parametrize("name", ["latent_mtp", "mamba_mtp", "puzzle"])
@torch.no_grad()
def test_mtp_step_equals_full_depth_one(name: str) -> None:
    """Stepwise drafting from true hidden states gives depth 1 of the full pass; a rollback leaves no trace."""
    model, tokens = build(name), random_tokens(2, SEQ)
    assert isinstance(model.config, HybridConfig)
    whole = model(tokens, return_mtp=1)
    cache = model.new_cache(batch=2)
    hidden = model(tokens, cache=cache).last_hidden
    parts = [model.mtp_step(tokens[:, 1:7], hidden[:, :6], cache).logits]
    assert cache.mtp is not None
    mark = cache.mtp.mark()
    draft = model.mtp_step(tokens[:, :1], hidden[:, 3:4], cache, logits="last")
    model.mtp_step(tokens[:, :1], draft.last_hidden, cache)
    cache.mtp.rollback(mark)
    parts += [model.mtp_step(tokens[:, i + 1 : i + 2], hidden[:, i : i + 1], cache).logits for i in range(6, 9)]
    # ragged: row 0 takes two pairs, row 1 five
    documents = torch.tensor([[0, 0, -1, -1, -1], [0] * 5])
    ragged = model.mtp_step(tokens[:, 10:15], hidden[:, 9:14], cache, documents=documents).logits
    close(torch.cat(parts, 1), whole.mtp_logits[0][:, :9])
    close(ragged[0, :2], whole.mtp_logits[0][0, 9:11])
    close(ragged[1], whole.mtp_logits[0][1, 9:14])
    assert cache.mtp.lengths.tolist() == [11, 14]
    with pytest.raises(RequestError, match="without MTP"):
        build("dense").mtp_step(tokens, hidden, cache)


@torch.no_grad()
def test_compat_floors_prefill_and_frees_decode() -> None:
    """`compat` swaps the limits of dt and nothing else; unknown names are refused."""
    model, tokens = build("limits"), random_tokens(2, 9)
    plain = model(tokens).logits
    model.compat = "transformers-5.23"
    cache = model.new_cache(batch=2)
    assert (model(tokens).logits - plain).abs().max() > 1e-2
    run(model, cache, tokens[:, :5])
    mamba = model.layers[0].mixer
    assert mamba.prefill_limit == (1e-3, float("inf"))
    assert mamba.decode_limit == (float("-inf"), float("inf"))
    model.compat = None
    close(model(tokens).logits, plain)
    with pytest.raises(RequestError, match='compat = "transformers-4"'):
        model.compat = "transformers-4"


@torch.no_grad()
def test_bf16_state_is_an_option() -> None:
    """state_dtype sets the recurrent state's precision: half the bytes, close results."""
    model, tokens = build("dense"), random_tokens(2, 9)
    cache, exact = model.new_cache(2, state_dtype=torch.bfloat16), model.new_cache(2)
    assert cache.states.ssm.nbytes * 2 == exact.states.ssm.nbytes
    for chunk in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7]):
        torch.testing.assert_close(run(model, cache, chunk), run(model, exact, chunk), atol=0.5, rtol=0.1)


def test_grad_modes_may_change_between_calls() -> None:
    """A cache made outside inference mode serves calls in inference mode, without gradients and with."""
    for name in ("latent_mtp", "llama"):
        model, tokens = build(name), random_tokens(2, 9)
        cache = model.new_cache(2)
        with torch.inference_mode():
            first = run(model, cache, tokens[:, :3])
        with torch.no_grad():
            second = run(model, cache, tokens[:, 3:4])
        third = run(model, cache, tokens[:, 4:])
        assert not third.requires_grad
        with torch.no_grad():
            close(torch.cat([first, second, third], 1), model(tokens).logits)
        model(tokens).logits.sum().backward()
