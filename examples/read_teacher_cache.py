"""Reads a row of a teacher cache, written by `mohawk cache`, with numpy alone: for any other trainer.

    columns = read_row("caches/llama", 0)

Of a top k: ids, log-probabilities and the log mass of all other tokens; of samples: ids (each counts 1 / draws); of
hidden states: the states (bfloat16 as its 16 bits). Position t answers for the token after t.
"""

import json

import numpy as np


def unpack(x, k, bits):
    return np.unpackbits(x, axis=-1, count=k * bits, bitorder="little").reshape(-1, k, bits) @ (1 << np.arange(bits))


def read_row(folder, index):
    about = json.load(open(f"{folder}/MANIFEST.json"))
    k, low, per = about["layout"]["k"], about["low_bits"], about["rows_per_shard"]
    token, n = [tuple(field) for field in about["record"]], about["layout"]["sequence_length"]
    row = [("text", "<u8"), ("crc", "<u4"), ("tokens", token, (n,))]
    tokens = np.memmap(f"{folder}/shard-{index // per:05d}.bin", dtype=row, mode="r")[index % per]["tokens"]
    found = {name: np.array(tokens[name]) for name, _ in token}
    for name in found.keys() & {"ids"}:
        found[name] = unpack(found[name], k, about["id_bits"])
    for name in found.keys() & {"low"}:
        high = np.nonzero(np.unpackbits(found.pop("high"), axis=-1, bitorder="little"))[1].reshape(n, k)
        found["logprobs"] = (high - np.arange(k) << low) + unpack(found.pop(name), k, low)
    for name in found.keys() & {"logprobs", "tail"}:
        size = np.maximum(code := found[name].astype(int), 8192) >> 13
        found[name] = np.where(code == 65535, -np.inf, -(code - (size - 1) * 8192) * 2.0 ** (size - 14))
    return found
