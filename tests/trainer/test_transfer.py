"""Batches on their way to a card, with a stand-in in which nothing is done before somebody waits for it."""

import pytest
import torch

from ddpm_hf.trainer.transfer import Transfer


class Late:
    """A card that is late: copies and steps stand in two queues, which run only when the host waits.

    A copy may run at any moment; here it runs as soon as possible, and a step as late as possible, which is the order
    in which a buffer that is written too early shows.
    """

    def __init__(self):
        self.steps, self.results, self.allocated = [], [], 0

    def allocate(self, like):
        self.allocated += 1
        return torch.empty_like(like)

    def copy(self, source, target):
        target.copy_(source)

    def launch(self, *buffers):
        self.steps.append(buffers)

    def mark(self):
        late, number = self, len(self.steps)

        class Event:
            @staticmethod
            def synchronize():
                late.run(number)

        return Event

    def run(self, number):
        while len(self.results) < number:
            self.results.append([buffer.clone() for buffer in self.steps[len(self.results)]])


@pytest.mark.parametrize("parts", [1, 3])
def test_steps_see_their_own_batches_however_late_they_run(parts):
    card = Late()
    transfer = Transfer(card, parts)
    given = [[torch.full((2, 3), 10 * step + part, dtype=torch.uint8) for part in range(parts)] for step in range(9)]
    behind = []
    for batches in given:
        card.launch(*[transfer(items) for items in batches])
        transfer.launched()
        behind.append(len(card.steps) - len(card.results))
    card.run(9)
    assert all(torch.equal(a, b) for x, y in zip(given, card.results, strict=True) for a, b in zip(x, y, strict=True))
    assert card.allocated == 2 * parts
    assert max(behind) == 2  # the host is two steps ahead, no more


def test_a_batch_of_another_shape_gets_another_buffer():
    card = Late()
    transfer = Transfer(card, 1)
    for size in (4, 4, 4, 2, 2, 4):
        x = torch.arange(size)
        assert torch.equal(transfer(x), x)
        transfer.launched()
    assert card.allocated == 5
