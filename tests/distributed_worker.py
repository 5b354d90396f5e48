"""Run under torchrun by test_distributed.py: one training step's gradient and batch, written to a
folder.

    torchrun --nproc_per_node 2 tests/distributed_worker.py FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime  # isort: skip
import torch
from torch.nn.parallel import DistributedDataParallel

import data
import train


def main():
    out = Path(sys.argv[1])
    with runtime.setup() as process:
        s = train.resolve(
            train.parse(
                [
                    "--image-size",
                    "8",
                    "--batch-size",
                    "8",
                    "--sa-k",
                    "2",
                    "--etsdm",
                    "--microbatch",
                    "3",
                    "--flip",
                ]
            )
        )
        model = train.Model(s, process.device)
        torch.nn.init.normal_(
            model.net.out_conv.weight, std=0.1, generator=torch.Generator().manual_seed(0)
        )
        trained = DistributedDataParallel(model.net) if process.world > 1 else model.net
        dataset = data.load("shapes", 8, 3)
        images = next(data.batches(dataset, 8, 16, 0, process.rank, process.world))
        seen = {}
        model.optimizer.step = lambda: seen.update(
            gradient=torch.cat([p.grad.flatten() for p in model.net.parameters()])
        )
        values = train.one_step(model, trained, s, process, images, None)
        sums = process.sum(*values[:3])
        gathered = process.gather(images)
        picture = torch.cat(gathered) if process.first else None
        shared = process.share(f"from rank {process.rank}")
        assert shared == "from rank 0"
        process.barrier()
        if process.first:
            torch.save(
                dict(
                    images=picture,
                    gradient=seen["gradient"],
                    losses=[v / process.world for v in sums],
                ),
                out / f"{process.world}.pt",
            )


if __name__ == "__main__":
    main()
