"""Reads a row of a teacher cache, written by `mohawk cache`, with numpy alone: for any other trainer.

    python examples/read_teacher_cache.py FOLDER ROW

Of a top k: ids, log-probabilities and the log mass of all other tokens; of samples: ids (each counts 1 / draws); of
hidden states: the states (bfloat16 as its 16 bits). Position t answers for the token after t.
"""

import json
import sys

import numpy as np


def read_row(folder: str, index: int) -> dict[str, np.ndarray]:
    about = json.load(open(f"{folder}/MANIFEST.json"))
    n, k, bits = about["layout"]["sequence_length"], about["layout"]["k"], about["id_bits"]
    token = [tuple(field) for field in about["record"]]
    shard, at = divmod(index, about["rows_per_shard"])
    row = [("text", "<u8"), ("crc", "<u4"), ("tokens", token, (n,))]
    tokens = np.memmap(f"{folder}/shard-{shard:05d}.bin", dtype=row, mode="r")[at]["tokens"]
    columns = {name: np.array(tokens[name]) for name in tokens.dtype.names}
    if "ids" in columns:
        stream = np.unpackbits(columns["ids"], axis=-1, count=k * bits, bitorder="little")
        columns["ids"] = stream.reshape(n, k, bits) @ (1 << np.arange(bits))
    for name in columns.keys() & {"logprobs", "tail"}:
        power, fraction = np.divmod(columns[name].astype(float), 8192)
        value = np.where(power == 0, fraction / 8192, (1 + fraction / 8192) * 2 ** (power - 1))
        columns[name] = -np.where(columns[name] == 65535, np.inf, value)
    return columns


if __name__ == "__main__":
    print(read_row(sys.argv[1], int(sys.argv[2])))
