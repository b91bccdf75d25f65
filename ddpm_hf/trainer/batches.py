"""The training batches of one process on its device, and the errors of reading them."""

from collections.abc import Iterator

from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.data.loading import Batch
from ddpm_hf.data.resident import ResidentData
from ddpm_hf.trainer.device import room_for_data
from ddpm_hf.trainer.progress import Run, TrainingError
from ddpm_hf.trainer.transfer import CopyStream, Transfer


class Batches(Iterator[Batch]):
    """The endless batches of this process, from the next optimizer step of the run on.

    The tensors of each are on the device. On a card, a batch is valid until two more steps have been launched. Data
    that fits a tenth of the card's memory is put there at the start, and batches are gathered there. Images that cannot
    be read are counted in the run's progress, and each is named once.
    """

    def __init__(self, run: Run):
        self.run = run
        acc, progress = run.accelerator, run.progress
        self._resident = self._put_on_device()
        loader = run.feed.loader(
            progress.place, process=acc.process_index, processes=acc.num_processes, state=progress.stream,
            pin_memory=acc.device.type == "cuda", resident=self._resident,
        )  # fmt: skip
        self._loaded: Iterator[Batch] = iter(loader)
        self._named: set[str] = set()
        self._copies = CopyStream(acc.device) if acc.device.type == "cuda" else None
        self._transfers: dict[str, Transfer] = {}  # by the name of the tensor

    def _put_on_device(self) -> ResidentData | None:
        """Put the data on the device, if it fits there, and say so; None leaves it to the host."""
        run, acc = self.run, self.run.accelerator
        room = room_for_data(acc.device)
        if not room:
            return None
        draws = (run.config.max_train_steps - run.progress.step) * run.global_batch
        try:
            resident = run.feed.resident(acc.device, room, draws)
        except Exception as error:  # memory, or data that cannot be read: that error comes with the step that needs it
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            acc.print(f"the data does not stay on {acc.device.type}, and is copied batch by batch: {reason}")
            return None
        if resident is not None:
            size = f"{resident.nbytes / 1e6:,.1f} MB"
            acc.print(f"the data stays on {acc.device.type}, where batches are gathered: {size}")
        return resident

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            TrainingError: the data cannot be read.
        """
        step = self.run.progress.step + 1
        try:
            batch = next(self._loaded)
        except Exception as error:  # a stream or a dataset from Python may raise anything
            raise TrainingError(
                f"step {step}: the data cannot be read further: {type(error).__name__}: {error}. The newest "
                f"whole checkpoint is {self.run.folder.newest_checkpoint()}; the same command goes on from there"
            ) from error
        for message in batch.skipped:
            self.run.progress.skipped += 1
            if message not in self._named:
                self._named.add(message)
                tqdm.write(f"left out: {message}")
        if batch.error:
            raise TrainingError(f"step {step}: {batch.error}")
        batch = batch.on(self.run.accelerator.device) if self._copies is None else batch.changed(self._copy)
        return batch if self._resident is None else self._resident.gather(batch)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._transfers:
            self._transfers[name] = Transfer(self._copies, self.run.config.gradient_accumulation_steps)
        return self._transfers[name](tensor)

    def launched(self) -> None:
        """Take note that the step of the newest batches has been launched."""
        for transfer in self._transfers.values():
            transfer.launched()

    def check_files(self) -> None:
        """Check that the files that are mapped into memory are as they were: reading one that was cut would end the
        process without a message.

        Raises:
            TrainingError: one of them was written to.
        """
        changed = self.run.feed.files.changed()
        if changed:
            raise TrainingError(
                f"step {self.run.progress.step}: the data was written to while training read it: {changed}. The newest "
                f"whole checkpoint is {self.run.folder.newest_checkpoint()}; the same command goes on from there when "
                "the data is as it was. To exchange such a file, write another one and rename it when no run reads it"
            )
