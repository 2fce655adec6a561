import pytest
import torch

from hf_cod.io.masking import mask_tokens
from hf_cod.io.text import SampleSettings, token_batches
from tests.tiny_tokenizers import bert_like, gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40


def test_masking_is_seeded_and_spares_special_tokens():
    tokenizer = bert_like()
    settings = SampleSettings(sequence_length=40, max_samples=8, batch_size=8)
    plain = token_batches(tokenizer, TEXT, settings)
    (masked,) = mask_tokens(tokenizer, plain, seed=1)
    hidden = masked["labels"] != -100
    assert torch.equal(masked["labels"][hidden], plain[0]["input_ids"][hidden])
    assert (masked["input_ids"][hidden] == tokenizer.mask_token_id).all()
    assert torch.equal(masked["input_ids"][~hidden], plain[0]["input_ids"][~hidden])
    assert not hidden[:, 0].any() and not hidden[:, -1].any() and hidden.any(-1).all()
    assert 0.08 < hidden.float().mean() < 0.25
    assert torch.equal(masked["labels"], mask_tokens(tokenizer, plain, seed=1)[0]["labels"])
    with pytest.raises(ValueError, match="mask token"):
        mask_tokens(gpt_like(), plain, seed=1)
