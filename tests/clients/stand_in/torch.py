"""The little of PyTorch that guidellm uses, its data loader, so that a load test need not install
six gigabytes: guidellm generates its prompts with it and computes nothing."""

import sys
from types import ModuleType
from typing import Generic, TypeVar

T = TypeVar("T")


class Tensor:
    """Named in guidellm's type annotations only."""


class Generator:
    """The order of prompts does not matter here."""

    def manual_seed(self, seed):
        return self


class IterableDataset(Generic[T]):
    """What can be iterated over."""


class DataLoader(Generic[T]):
    """Gives the items of a data set one by one, in this process."""

    def __init__(self, dataset, collate_fn, **_):
        self.dataset, self.collate_fn = dataset, collate_fn

    def __iter__(self):
        return (self.collate_fn([item]) for item in self.dataset)


def get_worker_info():
    """No worker processes."""


def module(name, **members):
    made = sys.modules[name] = ModuleType(name)
    vars(made).update(members)
    return made


members = dict(IterableDataset=IterableDataset, DataLoader=DataLoader)
utils = module("torch.utils")
utils.data = module("torch.utils.data", get_worker_info=get_worker_info, **members)
utils.data.dataset = module("torch.utils.data.dataset", **members)
utils.data.dataloader = module("torch.utils.data.dataloader", **members)
