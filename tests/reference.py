"""The reference mask sampler, image by image in the official draw order: what the golden masks pin down, and what
ijepa.py's batched sampler is compared with (test_ijepa.py) and timed against (bench.py)."""

import torch

from ijepa import block_sizes


def reference_masks(config, step, batch):
    """int64 (context [contexts, B, K], targets [targets, B, Kp]); sizes by `step`, places by torch's own generator."""
    grid = config.image_size // config.patch
    target_size, context_size = block_sizes(config, step)

    def place(size, regions):
        height, width = size
        tries, left = 0, 20
        while True:
            top = torch.randint(0, grid - height, (1,)).item()
            start = torch.randint(0, grid - width, (1,)).item()
            mask = torch.zeros(grid, grid, dtype=torch.int32)
            mask[top : top + height, start : start + width] = 1
            for region in regions[: max(0, len(regions) - tries)]:
                mask *= region
            indices = mask.flatten().nonzero()[:, 0]
            if len(indices) > config.min_keep:
                break
            left -= 1
            if left == 0:
                tries, left = tries + 1, 20
        complement = torch.ones(grid, grid, dtype=torch.int32)
        complement[top : top + height, start : start + width] = 0
        return indices, complement

    contexts, targets = [], []
    for _ in range(batch):
        blocks = [place(target_size, []) for _ in range(config.targets)]
        regions = [] if config.overlap else [complement for _, complement in blocks]
        targets.append([indices for indices, _ in blocks])
        contexts.append([place(context_size, regions)[0] for _ in range(config.contexts)])

    def stack(lists):
        shortest = min(len(indices) for image in lists for indices in image)
        return torch.stack([torch.stack([indices[:shortest] for indices in image]) for image in lists]).transpose(0, 1)

    return stack(contexts), stack(targets)
