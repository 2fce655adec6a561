"""What pre-training is compared with: the perplexity of knowing how frequent each token is."""

import math
from collections import Counter

import pytest
import torch

from hf_cod.training.pretraining.results import unigram_perplexity


def test_unigrams_by_counting():
    train, validation = torch.randint(0, 5, (4, 7)), torch.randint(0, 6, (3, 7))
    counts = Counter(train.flatten().tolist())
    total = train.numel() + 6  # each of six tokens once more than it was seen
    predicted = validation[:, 1:].flatten().tolist()  # the first token of a window is not predicted
    loss = -sum(math.log((counts[token] + 1) / total) for token in predicted) / len(predicted)
    assert unigram_perplexity(train, validation, 6) == pytest.approx(math.exp(loss))


def test_unseen_text_of_equal_tokens_is_as_hard_as_the_vocabulary_is_large():
    nothing = torch.empty(0, 4)
    assert unigram_perplexity(nothing, torch.tensor([[0, 1, 2, 3]]), 8) == pytest.approx(8)
