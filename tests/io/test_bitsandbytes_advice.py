"""Nothing prints what bitsandbytes logs when it is imported (on CPUs with AVX-512 BF16, without `kernels`)."""

import logging
import os
import re
import subprocess
import sys

import pytest
import transformers

from hf_cod.io.bitsandbytes_advice import advice_silenced
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

TEXT = "--text text.txt --dtype float32 --device cpu --sequence-length 8 --eval-samples 4"
TRAINED = f"{TEXT} --steps 2 --batch-size 4 --micro-batch-size 2 --no-plots --learning-rate 1e-2"
COMMANDS = {
    "finetune --estimate": "finetune model --estimate",
    "finetune": f"finetune model {TRAINED} --method lora --lora-rank 2 --output tuned",
    "heal": f"heal model --teacher model {TRAINED} --method lora --lora-rank 2 --no-speed --output healed",
    "prune --recover-steps": f"prune model {TEXT} --max-samples 4 --batch-size 2 --recover-steps 2 "
    "--no-plots --output pruned",
}
SLOW = ("finetune --estimate", "heal", "prune --recover-steps")
# Lines of our own: warnings, and records of a training without a progress bar.
OURS = re.compile(r"hf-cod \S+: warning: |\S+: step \d+ of \d+|step \d+ of \d+|$")


@pytest.mark.process
@pytest.mark.parametrize("command", ["finetune", *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])
def test_standard_error_has_no_lines_of_other_libraries(command, tmp_path):
    """In a process that has imported nothing yet: the line is logged by the first import."""
    build("llama").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 40)
    done = subprocess.run(
        [sys.executable, "-m", "hf_cod", *COMMANDS[command].split()],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not OURS.match(line)] == []


@pytest.mark.process
def test_no_public_name_prints_when_it_is_imported():
    """OwLoreConfig first: the line is logged by the first import of bitsandbytes."""
    code = "import hf_cod\nfor name in ('OwLoreConfig', *hf_cod.__all__): getattr(hf_cod, name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.process
def test_loading_a_model_that_bitsandbytes_quantized_prints_nothing(tmp_path):
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    build("llama").save_pretrained(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "model")
    code = f"from hf_cod.io.models import load_model; load_model({str(tmp_path / 'model')!r})"
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_advice_is_silenced_within_the_block_only():
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    with pytest.raises(ValueError, match="expected"), advice_silenced():
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
        raise ValueError("expected")
    assert logger.level == before
