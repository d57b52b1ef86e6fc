"""The released mask sampler, image by image in its order of draws: what the golden masks hold."""

import itertools

import torch

from ijepa import block_sizes, rectangles


def reference_masks(config, step, batch):
    """Return int64 (context [1, B, K], targets [M, B, Kp]); places by torch's own generator."""
    grid = config.image_size // config.patch
    target_size, context_size = block_sizes(config, step)

    def place(size, hidden):
        """Return a block without what is hidden; after each 20 tries one block less is hidden."""
        for tries in itertools.count():
            top, left = (torch.randint(0, grid - side, ()) for side in size)
            mask = rectangles(top, left, size, grid)
            for block in hidden[: max(0, len(hidden) - tries // 20)]:
                mask = mask & ~block
            if mask.sum() >= config.min_context:
                return mask

    contexts, targets = [], []
    for _ in range(batch):
        targets += [place(target_size, []) for _ in range(config.targets)]
        contexts.append(place(context_size, targets[-config.targets :]))

    def stack(masks):
        shortest = min(mask.sum() for mask in masks)
        cut = torch.stack([mask.nonzero()[:shortest, 0] for mask in masks])
        return cut.unflatten(0, (batch, -1)).transpose(0, 1)

    return stack(contexts), stack(targets)
