"""What evaluators find: names "task/metric"; those that end in "-" have one for each class."""

PANOPTIC_SCORES = tuple(
    f"panoptic_seg/{metric}{split}"
    for metric in ("PQ", "SQ", "RQ")
    for split in ("", "_th", "_st", "-")
)
BOUNDARY_SCORES = tuple(f"panoptic_seg/boundary_PQ{split}" for split in ("", "_th", "_st"))
SEM_SEG_SCORES = tuple(
    f"sem_seg/{metric}" for metric in ("mIoU", "fwIoU", "mACC", "pACC", "IoU-", "ACC-")
)
CITYSCAPES_SEM_SEG_SCORES = tuple(
    f"sem_seg/{metric}{each}"
    for metric in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")
    for each in ("", "-")
)
INSTANCE_SCORES = tuple(
    f"{task}/{metric}"
    for task in ("bbox", "segm")
    for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP-")
)
CITYSCAPES_INSTANCE_SCORES = ("segm/AP", "segm/AP50", "segm/AP-", "segm/AP50-")
