"""fastgpt's operators in transformers' GPT-2."""

import copy
import io
import subprocess
import sys

import pytest
import torch

import fastgpt
from fastgpt import ops
from tests.backends import BACKENDS

transformers = pytest.importorskip("transformers")
GPT2LMHeadModel, GPT2Model = transformers.GPT2LMHeadModel, transformers.GPT2Model

SIZES = {"vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}


def build(cls=GPT2LMHeadModel, **config):
    """Return a small GPT-2 far from its initialization, so that every part affects the result."""
    torch.manual_seed(1)
    usual = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    usual |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = cls(transformers.GPT2Config(**SIZES | usual | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pair(ops="native", **config):
    model = build(**config)
    return model, fastgpt.patch(copy.deepcopy(model), ops)


def ids(batch=3, time=11):
    return torch.randint(1, 61, (batch, time), generator=torch.Generator().manual_seed(2))


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def fused_attention(model, monkeypatch):
    """Count the calls of fastgpt's attention, to tell it from transformers' own."""
    calls = []
    backend = ops.get(model.transformer.h[0].fastgpt_ops)
    original = backend.causal_attention
    monkeypatch.setattr(
        backend, "causal_attention", lambda *args: calls.append(args) or original(*args)
    )
    return calls


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_same_logits_and_hidden_states(backend, use_cache, monkeypatch):
    model, fast = pair(backend)
    calls = fused_attention(fast, monkeypatch)
    options = {"use_cache": use_cache, "output_hidden_states": True}
    expected, actual = model(ids(), **options), fast(ids(), **options)
    close(actual.logits, expected.logits)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs)
    assert len(calls) == 2
    if use_cache:  # continue from the cache
        cache = "cache" if "cache" in actual else "past_key_values"  # until transformers 5.23
        more = {cache: actual[cache], "use_cache": True}
        after = fast(ids(3, 4), **more).logits
        whole = model(torch.cat([ids(), ids(3, 4)], 1)).logits[:, -4:]
        close(after, whole)
        assert len(calls) == 2  # by transformers' own attention


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_items", [None, 50, torch.tensor(50)])
def test_the_same_loss_and_gradients(backend, num_items, monkeypatch):
    labels = ids()
    labels[:, :3] = -100
    labels[1] = -100
    models = pair(backend)
    calls = fused_attention(models[1], monkeypatch)
    for model in models:
        model.train()
        out = model(ids(), labels=labels, num_items_in_batch=num_items)
        out.loss.backward()
        model.last = out
    close(models[1].last.loss, models[0].last.loss)
    assert models[1].last.logits is None
    assert len(calls) == 2
    expected = gradients(models[0])
    for name, grad in gradients(models[1]).items():
        close(grad, expected[name])


def test_labels_that_all_do_not_count():
    labels = torch.full_like(ids(), -100)
    for model in (models := pair()):
        model.train()
        assert model(ids(), labels=labels).loss.isnan()
        loss = model(ids(), labels=labels, num_items_in_batch=7).loss
        assert loss == 0
        loss.backward()
    for model in models:
        assert all((p.grad == 0).all() for p in model.parameters())


def test_where_the_logits_stay():
    model, fast = pair()
    evaluated = fast(ids(), labels=ids())
    expected = model(ids(), labels=ids())
    close(evaluated.logits, expected.logits)
    close(evaluated.loss, expected.loss)
    model.train(), fast.train()
    close(fast(ids()).logits, expected.logits)
    close(fast(ids(), labels=ids(), return_dict=False)[1], expected.logits)
    shifted = {"labels": ids(), "shift_labels": ids()}
    close(fast(ids(), **shifted).loss, model(ids(), **shifted).loss)
    fast.loss_function = lambda logits, labels, **_: logits.sum()
    close(fast(ids(), labels=ids()).loss, expected.logits.sum(), 1e-3)
    del fast._loss_function
    fast.lm_head.register_forward_hook(lambda module, args, output: output)
    close(fast(ids(), labels=ids()).logits, expected.logits)


def test_padding_runs_the_original_attention(monkeypatch):
    model, fast = pair()
    calls = fused_attention(fast, monkeypatch)
    mask = torch.ones_like(ids())
    close(fast(ids(), attention_mask=mask).logits, model(ids(), attention_mask=mask).logits)
    assert len(calls) == 2
    mask[0, :4] = 0
    close(fast(ids(), attention_mask=mask).logits, model(ids(), attention_mask=mask).logits)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "eager"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_unusual_attention_runs_the_original(config, monkeypatch):
    model, fast = pair(**config)
    calls = fused_attention(fast, monkeypatch)
    options = {"output_attentions": config.get("attn_implementation") == "eager"}
    expected, actual = model(ids(), **options), fast(ids(), **options)
    close(actual.logits, expected.logits)
    assert not calls
    for ours, theirs in zip(actual.attentions or (), expected.attentions or (), strict=True):
        close(ours, theirs)


def test_packed_texts_stay_apart():
    positions = torch.tensor([[*range(6), *range(5)]]).expand(3, -1)
    model, fast = pair()
    options = {"position_ids": positions, "use_cache": False}
    close(fast(ids(), **options).logits, model(ids(), **options).logits)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"])
def test_activations(activation):
    model, fast = pair(activation_function=activation)
    close(fast(ids()).logits, model(ids()).logits)
    replaced = "fastgpt_ops" in vars(fast.transformer.h[0].mlp.act)
    assert replaced == (activation in ("gelu_new", "gelu_pytorch_tanh"))


def test_cross_attention():
    model, fast = pair(add_cross_attention=True)
    options = {"encoder_hidden_states": torch.randn(3, 5, 32)}
    close(fast(ids(), **options).logits, model(ids(), **options).logits)
    close(fast(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize(
    "cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_greedy_writing(cache):
    model, fast = pair()
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False} | cache
    mask = torch.ones_like(ids())
    expected = model.generate(ids(), attention_mask=mask, **options)
    assert torch.equal(fast.generate(ids(), attention_mask=mask, **options), expected)
    mask[0, :4] = 0
    expected = model.generate(ids(), attention_mask=mask, **options)
    assert torch.equal(fast.generate(ids(), attention_mask=mask, **options), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model, fast = pair()
    fast.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    fast.transformer.h[0].attn.register_forward_hook(lambda *_: runs.append(0))
    for m in (model, fast):
        m.train()
        m(ids(), labels=ids(), use_cache=False).loss.backward()
    assert len(runs) == 2  # once more in the backward pass
    expected = gradients(model)
    for name, grad in gradients(fast).items():
        close(grad, expected[name])


def test_dropout_in_training_only():
    model, fast = pair(attn_pdrop=0.5, resid_pdrop=0.5)
    close(fast(ids()).logits, model(ids()).logits)
    fast.train()
    with_dropout = [fast(ids(), labels=ids()).loss for _ in range(2)]
    assert with_dropout[0] != with_dropout[1]
    for block in fast.transformer.h:  # dropout of the attention probabilities only
        block.attn.resid_dropout.p = block.mlp.dropout.p = 0.0
    assert fast(ids(), labels=ids()).loss != fast(ids(), labels=ids()).loss


def test_bfloat16():
    model, fast = (m.bfloat16() for m in pair())
    assert fast(ids()).logits.dtype == torch.bfloat16
    true = model.double()(ids()).logits
    plain = model.bfloat16()(ids()).logits
    assert (fast(ids()).logits - true).abs().max() <= 2 * (plain - true).abs().max()
    fast.train()
    fast(ids(), labels=ids()).loss.backward()
    assert fast.lm_head.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["reference", "native"])  # no bf16 in Triton's interpreter
def test_autocast(backend):
    model, fast = pair(backend)
    true = model.train()(ids(), labels=ids()).loss
    with torch.autocast("cpu", torch.bfloat16):
        losses = [m.train()(ids(), labels=ids()).loss for m in (model, fast)]
    losses[1].backward()
    assert abs(losses[1] - true) <= 2 * abs(losses[0] - true) + 0.01
    assert fast.lm_head.weight.grad.dtype == torch.float32


def test_a_compiler_sees_one_graph():
    model, fast = pair()
    compiled = torch.compile(fast.train(), backend="eager", fullgraph=True)
    loss = compiled(ids(), labels=ids(), use_cache=False).loss
    close(loss, model.train()(ids(), labels=ids()).loss)


def test_a_watched_norm_is_called():
    model, fast = pair()
    seen = []
    fast.transformer.h[1].ln_2.register_forward_hook(lambda *_: seen.append(1))
    close(fast(ids()).logits, model(ids()).logits)
    assert seen == [1]
    norm = fast.transformer.h[0].ln_2
    norm.forward = lambda x, inner=norm.forward: seen.append(0) or inner(x)
    close(fast(ids()).logits, model(ids()).logits)
    assert sorted(seen) == [0, 1, 1]


def test_unpatching_leaves_nothing_behind():
    model = build()
    before = model(ids(), labels=ids())
    state, attributes = model.state_dict(), [{**vars(m)} for m in model.modules()]
    types = [type(m) for m in model.modules()]
    forwards = [m.forward.__func__ for m in model.modules()]
    assert fastgpt.patch(model) is model
    assert model.state_dict().keys() == state.keys()
    assert [type(m) for m in model.modules()] != types
    assert [type(m).__name__ for m in model.modules()] == [t.__name__ for t in types]
    fast = model(ids(), labels=ids())
    assert fastgpt.unpatch(model) is model
    assert [type(m) for m in model.modules()] == types
    assert [m.forward.__func__ for m in model.modules()] == forwards
    assert [vars(m).keys() for m in model.modules()] == [a.keys() for a in attributes]
    after = model(ids(), labels=ids())
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    close(fast.logits, before.logits)


def test_copies_pickles_and_saved_models(tmp_path):
    model, fast = pair()
    expected = fast(ids()).logits
    copied = copy.deepcopy(fast)
    assert torch.equal(copied(ids()).logits, expected)
    fastgpt.unpatch(copied)
    assert torch.equal(fast(ids()).logits, expected)  # a copy is independent
    assert torch.equal(copied(ids()).logits, model(ids()).logits)
    file = io.BytesIO()
    torch.save(fastgpt.patch(build()), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(ids()).logits, expected)
    fast.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert type(loaded) is GPT2LMHeadModel
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_the_trainer_sees_the_same_arguments():
    import inspect

    model, fast = pair()
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)


def test_other_models_of_the_family():
    model = build(GPT2Model)
    before = model(ids()).last_hidden_state
    close(fastgpt.patch(model)(ids()).last_hidden_state, before)
    classifier = build(transformers.GPT2ForSequenceClassification)
    before = classifier(ids()).logits
    close(fastgpt.patch(classifier)(ids()).logits, before)


def test_what_is_not_exactly_transformers_own_is_left_alone():
    class Mine(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).logits * 2

    model = build(Mine)
    before = model(ids())
    close(fastgpt.patch(model)(ids()), before)
    assert type(model) is Mine


def test_refusals():
    model = build()
    with pytest.raises(TypeError, match=r"GPT2LMHeadModel or GPT2Model.*not torch.nn.*Linear"):
        fastgpt.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"before it is wrapped.*DataParallel"):
        fastgpt.patch(torch.nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"ops must be one of auto, .*not 'cuda'"):
        fastgpt.patch(model, "cuda")
    with pytest.raises(ValueError, match="not patched: there is nothing to undo"):
        fastgpt.unpatch(model)
    fastgpt.patch(model)
    with pytest.raises(ValueError, match="already patched"):
        fastgpt.patch(model)


def test_transformers_is_loaded_by_patching_alone():
    code = "import sys, fastgpt; fastgpt.patch; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_or_old_transformers_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.gpt2", None)
    monkeypatch.delitem(sys.modules, "fastgpt.interop.transformers_modules", raising=False)
    monkeypatch.delattr(fastgpt.interop, "transformers_modules", raising=False)
    with pytest.raises(ImportError, match="pip install 'transformers>=5'"):
        fastgpt.patch(build())


def test_the_class_makes_ordinary_models(tmp_path):
    """As in code that builds a second model, such as a frozen reference, with ``type(model)``."""
    fast = fastgpt.patch(build(), "native")
    fast.save_pretrained(tmp_path)
    usual = {"labels": ids()}
    expected = build().train()(ids(), **usual).loss
    for cls in (type(fast), fast):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is GPT2LMHeadModel
        close(loaded.train()(ids(), **usual).loss, expected)
        close(fastgpt.patch(loaded, "native").train()(ids(), **usual).loss, expected)
    new = type(fast)(fast.config)
    assert type(new) is GPT2LMHeadModel
    new.load_state_dict(fast.state_dict())
    close(new.train()(ids(), **usual).loss, expected)
    norm = fast.transformer.h[0].ln_1
    assert type(type(norm)(8)) is torch.nn.LayerNorm
    again = copy.deepcopy(fast)
    assert type(again) is type(fast)
    close(again.train()(ids(), **usual).loss, expected)
