"""Processes for tests: forked from a server that has imported PyTorch once, instead of importing it in each of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import wait

import torch

CONTEXT = multiprocessing.get_context("forkserver")
# PyTorch imports torch._dynamo at the first step of an optimizer.
CONTEXT.set_forkserver_preload(
    ["pytest", "accelerate", "torch._dynamo", "captum_idexpo.jury", "captum_idexpo.training"]
)


def run_together(n_processes, function, *arguments, timeout=300):
    """Return what a function returns in each of so many gloo processes; an error in one ends all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receivers, processes = [], []
    for rank in range(n_processes):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        processes.append(CONTEXT.Process(target=_run, args=(sender, rank, n_processes, port, function, arguments)))
        processes[-1].start()
        sender.close()  # so that the receiver sees the end of a process that was killed
        receivers.append(receiver)
    try:
        results = {}
        while len(results) < n_processes:
            ready = wait([receiver for receiver in receivers if receiver not in results], timeout)
            assert ready, f"The processes have not ended after {timeout} seconds."
            for receiver in ready:
                error, results[receiver] = receiver.recv()
                assert error is None, error
        return [results[receiver] for receiver in receivers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(sender, rank, n_processes, port, function, arguments):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if n_processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(n_processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    try:
        sender.send((None, function(*arguments)))
    except BaseException:  # pytest's own failures are no Exception
        sender.send((traceback.format_exc(), None))
