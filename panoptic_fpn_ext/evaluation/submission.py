"""Files for the panoptic test servers of COCO and Cityscapes: JSON and PNGs in one zip.

Both take the COCO result format (https://cocodataset.org/#format-results): a JSON file and a
folder of the same name with a panoptic PNG for each image, category ids being the official ones.
"""

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog

from ..data.panoptic_png import write_panoptic_png
from ..errors import UserError
from .base import ImageEvaluator

logger = logging.getLogger(__name__)


class PanopticSubmissionWriter(ImageEvaluator[dict[str, Any]]):
    """Writes predictions as they come; in the end the main process puts them into a zip.

    The PNGs are written by the process that predicts them, into a folder beside the zip that is
    removed in the end. Processes on several machines must share it.
    """

    output_key = "panoptic_seg"

    def __init__(
        self,
        *,
        zip_file: str | os.PathLike,
        name: str,
        image_root: str | os.PathLike,
        thing_category_ids: Sequence[int],
        stuff_category_ids: Sequence[int],
        distributed: bool = True,
    ) -> None:
        """
        Args:
            zip_file: what to write.
            name: of the JSON file and the folder in it.
            image_root: folder of the images; PNGs have their paths below it.
            thing_category_ids: official id of each thing category.
            stuff_category_ids: official id of each semantic class.
            distributed: gather from all processes; otherwise each writes its own.
        """
        super().__init__(distributed=distributed)
        self._zip_file = Path(zip_file)
        self._folder = self._zip_file.with_suffix("")
        self._name = name
        self._image_root = Path(image_root)
        self._category_ids = {True: list(thing_category_ids), False: list(stuff_category_ids)}

    @classmethod
    def from_dataset(
        cls, dataset_name: str, output_folder: str | os.PathLike, *, distributed: bool = True
    ) -> "PanopticSubmissionWriter":
        """The writer of ``output_folder/<dataset>_submission.zip``.

        Names in it are ``submission_name`` of the dataset's metadata; by default those that the
        COCO server wants, ``panoptic_<split>_<algorithm>_results``.
        """
        metadata = MetadataCatalog.get(dataset_name)
        name = f"{Path(metadata.panoptic_json).stem}_panoptic-fpn_results"
        return cls(
            zip_file=Path(output_folder) / f"{dataset_name}_submission.zip",
            name=metadata.get("submission_name", name),
            image_root=metadata.image_root,
            thing_category_ids=list(metadata.thing_dataset_id_to_contiguous_id),
            stuff_category_ids=list(metadata.stuff_dataset_id_to_contiguous_id),
            distributed=distributed,
        )

    def evaluate_image(
        self,
        record: Mapping[str, Any],
        prediction: tuple[torch.Tensor, Sequence[Mapping[str, Any]]],
        source: str,
    ) -> dict[str, Any]:
        """Write the panoptic PNG of an image.

        Args:
            record: dataset dict with ``file_name`` and ``image_id``.
            prediction: ``panoptic_seg``, see :class:`PanopticQualityEvaluator`.

        Returns:
            Its entry in the JSON file.
        """
        ids, segments = prediction
        name = self._png_name(record["file_name"])
        png = self._folder / self._name / name
        png.parent.mkdir(parents=True, exist_ok=True)
        write_panoptic_png(png, np.maximum(ids.cpu().numpy(), 0))  # -1 is void too
        return {
            "image_id": record["image_id"],
            "file_name": name,
            "segments_info": [
                {"id": s["id"], "category_id": self._category_ids[s["isthing"]][s["category_id"]]}
                for s in segments
            ],
        }

    def _png_name(self, file_name: str) -> str:
        path = Path(file_name)
        if path.is_relative_to(self._image_root):
            return path.relative_to(self._image_root).with_suffix(".png").as_posix()
        return f"{path.stem}.png"

    def summarize(self, images: Mapping[Any, dict[str, Any]]) -> None:
        """Write the zip.

        Raises:
            UserError: two images have one name, or PNGs of other processes are not to be found.
        """
        annotations = list(images.values())
        pngs = [self._folder / self._name / entry["file_name"] for entry in annotations]
        if len(set(pngs)) < len(pngs):
            raise UserError(f"{self._zip_file}: two images have one name, and so would their PNGs")
        if absent := [png for png in pngs if not png.is_file()]:
            raise UserError(
                f"{len(absent)} of {len(pngs)} predictions are missing, first {absent[0]}: with "
                "several machines OUTPUT_DIR must be a folder that all of them share"
            )

        self._zip_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._zip_file.with_suffix(".zip.partial")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:  # PNGs do not shrink
            content = json.dumps({"annotations": annotations})
            file.writestr(f"{self._name}.json", content, zipfile.ZIP_DEFLATED)
            for png in pngs:
                file.write(png, png.relative_to(self._folder).as_posix())
        partial.replace(self._zip_file)
        shutil.rmtree(self._folder, ignore_errors=True)
        logger.info(f"Submission of {len(pngs)} images written to {self._zip_file}")
