"""Generated images in training: a file of them, and their part of every batch."""

from pathlib import Path

from pydantic import Field, model_validator

from jemkit.options import Options


class Extra(Options):
    """Generated images that share every batch with images of the training split."""

    file: Path | None = None  # .npz with image and label, or .npy with images alone
    fraction: float | None = Field(None, ge=0, le=1)  # of every batch
    labels: Path | None = None  # a model whose predictions are the labels, where there are none

    @property
    def on(self) -> bool:
        """Whether batches contain generated images."""
        return self.file is not None and bool(self.fraction)

    @model_validator(mode="after")
    def _fraction_of_a_file(self) -> "Extra":
        if self.file is not None and self.fraction is None:
            raise ValueError(
                f"a file of generated images, {self.file}, and no fraction of a batch for them: "
                "add --extra-fraction (extra.fraction), such as 0.7"
            )
        return self

    def unused(self) -> dict[str, str]:
        if self.file is None:
            given = {"fraction": self.fraction, "labels": self.labels}
            return {name: "without a file, --extra-data" for name, value in given.items() if value}
        return {} if self.fraction else {"labels": "where fraction is 0"}
