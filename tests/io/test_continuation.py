import torch

from hf_cod import perplexity, token_batches
from hf_cod.io.continuation import split_in_two
from tests.tiny_models import build_encoder_decoder
from tests.tiny_tokenizers import bert_like

TEXTS = ["one two three four five six seven", "one two", "eight nine ten a one"]


def test_the_encoder_reads_the_first_half_of_each_sample_and_the_decoder_writes_the_second():
    """As the model itself derives the decoder's tokens from labels."""
    model, tokenizer = build_encoder_decoder("t5"), bert_like()
    options = {"pack": False, "sequence_length": 12, "batch_size": 2}
    losses, count = 0.0, 0
    for batch in token_batches(tokenizer, TEXTS, **options):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            tokens = ids[mask.bool()]
            half = (len(tokens) + 1) // 2
            with torch.no_grad():
                loss = model(input_ids=tokens[None, :half], labels=tokens[None, half:]).loss
            losses, count = losses + float(loss) * (len(tokens) - half), count + len(tokens) - half
    found = perplexity(model, tokenizer=tokenizer, texts=TEXTS, **options)
    torch.testing.assert_close(found, float(torch.tensor(losses / count).exp()), atol=0, rtol=1e-4)


def test_samples_of_different_lengths():
    ids, mask = torch.tensor([[5, 6, 7, 8, 9], [5, 0, 0, 0, 0]]), torch.tensor([[1] * 5, [1] + [0] * 4])
    (batch,) = split_in_two([{"input_ids": ids, "attention_mask": mask}], start=1, padding=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [5, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "decoder_input_ids": [[1, 8], [1, 0]],
        "decoder_attention_mask": [[1, 1], [1, 0]],
        "labels": [[8, 9], [-100, -100]],
    }
