"""Prefix cache of a request: finds its cached blocks at admission, publishes computed ones.

BlockManager owns the blocks; the hashes of a request's blocks are computed only here.
"""

from engine.scheduler.block_manager import (
    BlockManager,
    adapter_hash,
    block_contents,
    block_hash,
    root_hash,
)
from engine.scheduler.request import Request


def find_cached_blocks(blocks: BlockManager, request: Request) -> list[int]:
    """Return the blocks of the longest cached prefix of the request's tokens; takes no reference.

    At least one token is left to compute, since its logits give the next token.
    """
    if not blocks.prefix_caching or _needs_all_rows(request):
        return []
    return blocks.find(_hashes(blocks, request, (request.num_tokens - 1) // blocks.block_size))


def _needs_all_rows(request: Request) -> bool:
    """Whether the hidden states of all prompt tokens are needed, or of the first one."""
    return request.awaits_prompt_logprobs or request.sampling.pooling in ("mean", "cls")


def publish_blocks(blocks: BlockManager, request: Request, num_computed: int) -> None:
    """Make the full blocks of the first `num_computed` tokens findable.

    These tokens must have been computed: a step in flight does not count. What an adapter computes
    that is not proven yet is kept from others.
    """
    if not blocks.prefix_caching or request.awaits_proof:
        return
    num_full = num_computed // blocks.block_size
    if num_full == request.num_published_blocks:
        return
    first, hashes = request.num_published_blocks, _hashes(blocks, request, num_full)
    blocks.publish(request.block_table[first:num_full], hashes[first:])
    request.num_published_blocks = num_full


def _hashes(blocks: BlockManager, request: Request, num_blocks: int) -> list[bytes]:
    """Hashes of the request's first full blocks; the chain is kept and extended as needed.

    Blocks before the one in which the adapter begins to act have the hashes of the base model's.
    """
    known, size = request.block_hashes, blocks.block_size
    first = len(known)
    if first >= num_blocks:
        return known[:num_blocks]
    start, scope = request.adapter_start, request.scope
    assert start is not None, "the hashes depend on where the adapter begins to act"
    token_ids = request.token_ids(first * size, num_blocks * size)
    previous = known[-1] if known else root_hash(scope)
    for i, content in enumerate(block_contents(token_ids, size), first):
        if i == start // size:
            previous = adapter_hash(previous, scope.adapter_digest, start)
        previous = block_hash(previous, content)
        known.append(previous)
    return known[:num_blocks]
