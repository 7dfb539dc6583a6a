"""
A Hugging Face text classifier
==============================

After this guide you can train the explanation of a text classifier of `transformers`, with its attention mask. The BERT
here is small and starts from random weights, so nothing is downloaded. For a pretrained model, change only the line
that creates the model.
"""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from captum_idexpo import KeywordModel
from captum_idexpo.attr import InputXGradient
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_attribution_bars

# %%
# Each text has 4 to 10 words between [CLS] and [SEP], and is padded to 12 tokens. One of six words says whether the
# film is good or bad.

words = ["[PAD]", "[CLS]", "[SEP]", "great", "superb", "lovely", "awful", "dull", "boring", "the", "a", "film", "plot"]
words += ["actor", "scene", "was", "is", "and", "but", "with"]
generator = torch.Generator().manual_seed(0)
n, places = 1200, torch.arange(12)
y = torch.randint(2, (n,), generator=generator)
lengths = torch.randint(4, 11, (n, 1), generator=generator)
ids = torch.randint(9, len(words), (n, 12), generator=generator)
verdict = torch.randint(3, (n, 1), generator=generator) + torch.where(y == 1, 3, 6)[:, None]
ids.scatter_(1, 1 + (torch.rand(n, 1, generator=generator) * lengths).long(), verdict)
ids[:, 0] = 1  # [CLS]
ids = ids.where(places <= lengths, 0).scatter(1, lengths + 1, 2)  # [SEP], then padding
mask = (ids != 0).long()
train = DataLoader(TensorDataset(ids[:1000], mask[:1000], y[:1000]), batch_size=50, shuffle=True, generator=generator)

# %%
# These are the ten lines. Token ids have no gradient and cannot be masked softly, so the explanation starts at the
# embeddings. ``KeywordModel`` calls the model by keyword arguments and returns its logits. ``feature_mask`` makes the
# numbers of a word one location. It puts [CLS], [SEP] and the padding together into the last location. The attention
# mask is passed as an additional argument of the model.

torch.manual_seed(0)
config = BertConfig(
    vocab_size=len(words),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=2,
)
bert = BertForSequenceClassification(config)
model = KeywordModel(bert, "inputs_embeds", "attention_mask")
embed = bert.get_input_embeddings()


def by_word(embedded):
    """Return the location of each number ``(B, 12, 32)``: the place of its word, or 11 for the special tokens."""
    special = (embedded[:, :, None] == embed.weight[:3]).all(-1).any(-1)
    return torch.where(special, 11, places)[:, :, None].expand_as(embedded)


regularizer = InsertionDeletion(
    InputXGradient(model),
    baselines=lambda embedded: embed.weight[0].detach().expand_as(embedded),  # a masked word becomes padding
    feature_mask=by_word,
    group_reduction="sum",
    insertion_weight=0.1,
    deletion_weight=0.1,
    steps_per_update=2,
)
optimizer = torch.optim.AdamW(bert.parameters(), lr=2e-3)
for ids_, mask_, y_ in [*train, *train, *train]:
    embedded = embed(ids_)
    terms = regularizer(embedded, y_, additional_forward_args=mask_)
    loss = cross_entropy(model(embedded, mask_), y_) + sum(terms.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

bert.eval()
x_test, mask_test, y_test = embed(ids[1000:]).detach(), mask[1000:], y[1000:]
with torch.no_grad():
    accuracy = (model(x_test, mask_test).argmax(1) == y_test).float().mean()
scores = regularizer.scores(x_test, y_test, additional_forward_args=mask_test)
print(f"accuracy {accuracy:.2f}, insertion {scores.insertion.mean():.2f}, deletion {scores.deletion.mean():.2f}")

# %%
# With the trainer, the loader yields ids, and ``unpack`` turns them into embeddings: ``unpack=lambda batch:
# Batch(embed(batch["input_ids"]), batch["labels"], None, batch["attention_mask"])``. Check the names in
# ``KeywordModel``. If a model takes ``token_type_ids`` and you pass the mask under that name, the model reads the mask
# as something else.
#
# The figure shows the evidence of the words of one text. All numbers of a word have the value of the word.

text = [words[i] for i in ids[1000] if i > 2]
(attribution,) = regularizer.attribution(x_test[:1], y_test[:1], additional_forward_args=mask_test[:1])
numbered = [f"{place} {word}" for place, word in enumerate(text, start=1)]
figure = plot_attribution_bars({f"for class {int(y_test[0])}": attribution[0, 1 : len(text) + 1, 0]}, numbered)

# %%
# The mistake to avoid
# --------------------
#
# Pass the attention mask wherever the explainer or a metric calls the model. Without the mask there is no error. But
# the model attends to the padding, and the explanation is of another text than the one that the model classifies.

with_mask, without = (
    InputXGradient(model).attribute(x_test, target=y_test, additional_forward_args=side).sum(2)
    for side in (mask_test, torch.ones_like(mask_test))
)
print(f"without the mask the maps change by {(with_mask - without).abs().sum() / with_mask.abs().sum():.0%}")
