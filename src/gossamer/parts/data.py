"""The weighted-loss data path: rows of any common file to float-weighted batches and their loss.

    read_rows / scan   ->  Row             one schema, four shapes               data_files, data_aliases, data_rows
    tokenise           ->  Example         ids, labels, a weight for each token  data_tokens
    examine            ->  Diagnosis       the data doctor                       data_doctor
    load_examples      ->  Examples        the same checks, then training data   data_doctor
    Collator, pack     ->  batch           padding, packing, packed masks        data_batch
    weighted_loss      ->  Tensor          logits at supervised positions only   data_loss

This module gathers the public names. It needs torch; rows, tokens and the doctor do not, and are imported from their
own modules where start-up time counts.
"""

from gossamer.parts.data_batch import Batch, Collator, model_inputs, pack, packed_mask
from gossamer.parts.data_doctor import Diagnosis, Examples, examine, load_examples
from gossamer.parts.data_files import Finding, Source
from gossamer.parts.data_loss import (
    label_mask,
    selected_nll,
    supervised_logits,
    token_nll,
    weight_sum,
    weighted_loss,
    weighted_nll,
)
from gossamer.parts.data_rows import Row, Rows, as_row, message_weight, read_rows, scan
from gossamer.parts.data_tokens import (
    IGNORE,
    PLAIN_TEMPLATE,
    Example,
    PreferencePair,
    encode_border,
    encode_prompt,
    prefix_ids,
    render,
    tokenise,
)

__all__ = [
    "IGNORE",
    "PLAIN_TEMPLATE",
    "Batch",
    "Collator",
    "Diagnosis",
    "Example",
    "Examples",
    "Finding",
    "PreferencePair",
    "Row",
    "Rows",
    "Source",
    "as_row",
    "encode_border",
    "encode_prompt",
    "examine",
    "label_mask",
    "load_examples",
    "message_weight",
    "model_inputs",
    "pack",
    "packed_mask",
    "prefix_ids",
    "read_rows",
    "render",
    "scan",
    "selected_nll",
    "supervised_logits",
    "token_nll",
    "tokenise",
    "weight_sum",
    "weighted_loss",
    "weighted_nll",
]
