"""Preparing data: documents → shards of blocks, cut and counted once, that training reads from the disk.

    DIR/
      plan.json       what is prepared: digests of the data and of the tokenizer, what is held out
      tokenizer/
      shard-000000/   about four million characters of the training documents, in their order
        text.npy        uint8 [bytes]      their UTF-8
        blocks.npy      uint8 [blocks, 3]  of each block: its bytes, its tokens, its steps (units and `<eob>`);
                                           uint16 where a block may have 64 units or more
        parts.npy       int32 [parts, 6]   of each part of a document: blocks, blocks of its prompt, bytes, tokens,
                                           steps that are learnt, whether the document ends
        shard.json      SHA-256 of the other three
      …
      held-out-000000/  a shard of the validation documents
      …
      manifest.json   SHA-256 of every shard.json and of itself; written last: without it, the folder is not finished

    text     "Don't add 54663 +\n"
    blocks    5 1 .. | 4 2 .. | 6 6 .. | 2 1 .. | 1 1 ..

A shard is there as a whole or not at all, and depends on nothing but the data, the tokenizer and its number; so
preparation goes on where it was interrupted, and it does not matter how many processes share the work. No file is a
pickle. Ids are not stored: a batch looks its blocks up in a `BlockTable`, which is emptied when it has grown large.
"""
