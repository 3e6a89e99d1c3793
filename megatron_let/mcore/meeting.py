"""Where the ranks meet: the store that they share, and the process group that they form through it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta

import torch.distributed as dist

from megatron_let.errors import ConfigError, LetError

Watch = Callable[[dist.Store, int, int], AbstractContextManager[None]]
"""Watches over the ranks of a store from before they form their group until after it: (store, rank, world size)."""

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def unwatched(store: dist.Store, rank: int, world_size: int) -> AbstractContextManager[None]:
    """Watch over nothing."""
    return nullcontext()


@contextmanager
def process_group(backend: str, timeout: timedelta, watch: Watch) -> Iterator[None]:
    """Form the process group that the launcher's environment describes; without one, a group of this program alone.

    A group that exists already (tests) is used and left as it is.

    Raises:
        ConfigError: the environment is there only in part, or the port where the ranks meet is taken.
        LetError: nobody answers there.
    """
    with ExitStack() as stack:
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            stack.enter_context(watch(store, dist.get_rank(), dist.get_world_size()))
        else:
            store, rank, world_size = _meet(timeout)
            stack.enter_context(watch(store, rank, world_size))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
            stack.callback(dist.destroy_process_group)
        yield


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the ranks' store, this rank and their number."""
    missing = [name for name in _VARIABLES if name not in os.environ]
    if len(missing) == len(_VARIABLES):
        return dist.HashStore(), 0, 1  # started without a launcher
    if missing:
        raise ConfigError(
            f"the launcher set only part of its environment ({', '.join(missing)} missing); use torchrun"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    is_host = (
        rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    )  # torchrun hosts it itself
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=is_host,
            timeout=timeout,
            wait_for_workers=False,  # the watch is to see who does not come
            multi_tenant=True,
        )
    except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text:
            raise ConfigError(
                f"the ranks cannot meet at {address}: the port is in use; give another MASTER_PORT"
            ) from error
        raise LetError(
            f"the ranks cannot meet at {address} (MASTER_ADDR, MASTER_PORT), which rank 0 or the launcher opens: {text}"
        ) from error
    return dist.PrefixStore("default_pg", store), rank, world_size
