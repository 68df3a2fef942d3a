"""Which checkpoints a training keeps."""

from detectron2.engine import hooks

from .checkpoint import PanopticFPNCheckpointer


class KeepNewest(hooks.PeriodicCheckpointer):
    """Detectron2's hook, of whose checkpoints the newest are kept.

    Its own ``max_to_keep`` knows those of one process alone: a resumed training would leave what it
    found, and one that it fell back to could be removed for a damaged one.
    """

    def __init__(self, checkpointer: PanopticFPNCheckpointer, period: int, keep: int) -> None:
        """
        Args:
            checkpointer: saves and removes.
            period: iterations between two.
            keep: how many, 0 for all.
        """
        super().__init__(checkpointer, period)
        self._keep = keep

    def after_step(self) -> None:
        super().after_step()
        if self._keep and (self.trainer.iter + 1) % self.period == 0:
            self.checkpointer.keep_newest(self._keep, self.trainer.iter)
