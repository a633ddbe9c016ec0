"""Image and sequence classifiers of Hugging Face's transformers, from the hub or a local folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from amc_env.errors import UserError
from amc_env.validation import Positive
from search import huggingface
from search.models.source import ModelSource


def hf_model(
    name: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    original_lr: Positive = 0.03,
) -> ModelSource:
    """A classifier of transformers, with the weights of its repository or folder.

    Its inputs are images [N, C, H, W], or ``input_ids`` and ``attention_mask`` by name; it returns ``logits``.

    Args:
        name: Of a repository on the hub, or a folder that ``save_pretrained`` wrote.
        weights: See `ModelSource`.
        key: See `ModelSource`.
        original_lr: See `ModelSource`.

    Raises:
        UserError: transformers is missing, the configuration cannot be read, or it is of no classifier.
    """
    if name is None:
        raise UserError(
            "{field} is needed: a name on the hub, or a folder", code="missing", field="model.name"
        )
    configuration = huggingface.configuration(name)
    is_image = huggingface.kind_of(configuration) == huggingface.IMAGE

    def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
        return huggingface.untrained(configuration, classes)

    def pretrained(shape: tuple[int, int, int], classes: int) -> nn.Module:
        return huggingface.pretrained(name, configuration)

    names = tuple(str(configuration.id2label[number]) for number in range(configuration.num_labels))
    settings: dict[str, Any] = huggingface.image_settings(name) if is_image else {"tokenizer": name}
    return ModelSource(
        name,
        build,
        original_lr,
        weights,
        key=key,
        pretrained=pretrained,
        data_settings=settings,
        needs_shape=False,
        class_names=() if names[0].startswith("LABEL_") else names,
    )
