"""Prefix cache of a request: finds its cached blocks at admission, publishes computed ones.

BlockManager owns the blocks; the hashes of a request's blocks are computed only here.
"""

from engine.scheduler.block_manager import (
    BlockManager,
    adapter_hash,
    block_contents,
    block_hashes,
    root_hash,
)
from engine.scheduler.request import Request


def find_cached_blocks(blocks: BlockManager, request: Request) -> list[int]:
    """Return the blocks of the longest cached prefix of the request's tokens; takes no reference.

    At least one token is left to compute, since its logits give the next token.
    """
    if not blocks.prefix_caching or _needs_all_rows(request):
        return []
    num_whole = (request.num_tokens - 1) // blocks.block_size
    _hash_blocks(blocks, request, num_whole)
    return blocks.find(request.block_hashes[:num_whole])


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
    first = request.num_published_blocks
    _hash_blocks(blocks, request, num_full)
    blocks.publish(request.block_table[first:num_full], request.block_hashes[first:num_full])
    request.num_published_blocks = num_full


def _hash_blocks(blocks: BlockManager, request: Request, num_blocks: int) -> None:
    """Have the hashes of the request's first full blocks; the chain is extended as needed.

    Blocks before the one in which the adapter begins to act have the hashes of the base model's.
    """
    known, size = request.block_hashes, blocks.block_size
    first = len(known)
    if first >= num_blocks:
        return
    start, scope = request.adapter_start, request.scope
    assert start is not None, "the hashes depend on where the adapter begins to act"
    contents = block_contents(request.token_ids(first * size, num_blocks * size), size)
    previous = known[-1] if known else root_hash(scope)
    num_before = start // size - first  # blocks before the one in which the adapter begins
    if 0 <= num_before < len(contents):
        base, contents = contents[:num_before], contents[num_before:]
        known += block_hashes(previous, base)
        previous = adapter_hash(known[-1] if base else previous, scope.adapter_digest, start)
    known += block_hashes(previous, contents)
