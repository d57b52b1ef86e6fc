"""The released mask sampler, image by image in its order of draws: what the golden masks hold."""

import torch

from ijepa import block_sizes


def reference_masks(config, step, batch):
    """Return int64 (context [1, B, K], targets [M, B, Kp]); places by torch's own generator."""
    grid = config.image_size // config.patch
    target_size, context_size = block_sizes(config, step)

    def place(size, regions):
        height, width = size
        relaxed, left = 0, 20
        while True:
            top = torch.randint(0, grid - height, (1,)).item()
            start = torch.randint(0, grid - width, (1,)).item()
            mask = torch.zeros(grid, grid, dtype=torch.int32)
            mask[top : top + height, start : start + width] = 1
            for region in regions[: max(0, len(regions) - relaxed)]:
                mask *= region
            indices = mask.flatten().nonzero()[:, 0]
            if len(indices) >= config.min_context:
                break
            left -= 1
            if left == 0:
                relaxed, left = relaxed + 1, 20
        complement = torch.ones(grid, grid, dtype=torch.int32)
        complement[top : top + height, start : start + width] = 0
        return indices, complement

    contexts, targets = [], []
    for _ in range(batch):
        blocks = [place(target_size, []) for _ in range(config.targets)]
        targets.append([indices for indices, _ in blocks])
        contexts.append([place(context_size, [complement for _, complement in blocks])[0]])

    def stack(lists):
        shortest = min(len(indices) for image in lists for indices in image)
        cut = [torch.stack([indices[:shortest] for indices in image]) for image in lists]
        return torch.stack(cut).transpose(0, 1)

    return stack(contexts), stack(targets)
