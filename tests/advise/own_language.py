"""A small language model with padding, and losses weighted by tokens, as a reader brings them."""

import torch
import torch.nn.functional as F
from torch import nn


def token_losses(model, batch):
    """Next-token losses, weighted by the tokens that are no padding."""
    tokens, real = batch["tokens"], batch["tokens"][:, 1:] > 0
    logits = model(tokens[:, :-1]).transpose(1, 2)
    each = F.cross_entropy(logits, tokens[:, 1:], reduction="none")
    return (each * real).sum(1) / real.sum(1), real.sum(1)


def model():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Embedding(12, 16), nn.TransformerEncoder(layer, 1), nn.Linear(16, 12))


def sentences():
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(11, (200, 1), generator=generator)
    tokens = 1 + (start + torch.arange(8)) % 11
    return [{"tokens": row[: 4 + number % 5]} for number, row in enumerate(tokens)]


def padded(items):
    rows = [item["tokens"] for item in items]
    return {"tokens": nn.utils.rnn.pad_sequence(rows, batch_first=True)}
