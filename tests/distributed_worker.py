"""Run under torchrun by test_distributed.py: the batch, the gradient and the losses of one training
step, written to FOLDER/WORLD_SIZE.pt.

    torchrun --nproc_per_node 2 tests/distributed_worker.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import data
import train
from config import Config
from support import distributed
from support.cli import parse_into

FLAGS = "--image-size 8 --batch-size 8 --sa-k 2 --etsdm --microbatch 3 --flip --grad-clip 0"


def main():
    with distributed.init() as dist:
        config = parse_into(Config, FLAGS.split())
        torch.manual_seed(0)
        state = train.TrainState(train.DiffusionObjective(config), config)
        torch.nn.init.normal_(state.net.out_conv.weight, std=0.1)
        model = DistributedDataParallel(state.net) if dist.world_size > 1 else state.net
        dataset = data.load("shapes", 8, 3)
        images = next(data.batches(dataset, 8, 16, 0, dist.rank, dist.world_size))
        found = {}
        state.optimizer.step = lambda: found.update(
            gradient=torch.cat([p.grad.flatten() for p in state.net.parameters()])
        )
        found["values"] = train.train_step(state, model, images, config, dist, None)
        gathered = dist.gather(images)
        assert dist.broadcast(f"from rank {dist.rank}") == "from rank 0"
        last = dist.rank == dist.world_size - 1
        assert dist.any(last) and not dist.any(False) and dist.any(False, last) == [False, True]
        assert dist.on_main(lambda: dist.rank) == 0
        assert dist.main_first(lambda: dist.rank) == dist.rank
        if dist.is_main:
            found["images"] = torch.cat(gathered)
            torch.save(found, Path(sys.argv[1]) / f"{dist.world_size}.pt")


if __name__ == "__main__":
    main()
