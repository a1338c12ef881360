"""Speech, Whisper: the decoder's words and its hidden states, the teacher's encoder kept as it is (Distil-Whisper).

python examples/whisper_distillation.py
"""

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from mohawk import HiddenMatch, KnowledgeDistiller, match_hidden


def tiny_whisper(decoder_layers: int) -> WhisperForConditionalGeneration:
    shape = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    shape |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_layers": decoder_layers, "num_mel_bins": 8}
    tokens = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = WhisperConfig(
        vocab_size=64, max_source_positions=16, max_target_positions=20, suppress_tokens=None,
        begin_suppress_tokens=None, **shape, **tokens,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    teacher, student = tiny_whisper(4), tiny_whisper(2)
    student.get_encoder().load_state_dict(teacher.get_encoder().state_dict())
    student.get_encoder().requires_grad_(False)
    match = HiddenMatch([(0, 1), (1, 3)], 32, 32)
    distiller = KnowledgeDistiller(
        teacher,
        student,
        task="seq2seq_lm",
        ce_weight=1.0,
        kd_weight=0.8,
        matchings={"hidden": match_hidden(match, 0.1)},
    )
    speech, labels = torch.randn(4, 8, 32), torch.randint(3, 64, (4, 6))  # log-mel frames (rows, bins, 2 x positions)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = distiller.compute_loss(input_features=speech, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()
