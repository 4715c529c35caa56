"""Group DRO in a training loop of your own: three lines of it are this package's.

python examples/own_loop.py --model DIR --corpus FILE --out DIR
"""

import argparse

import torch

from robustdebias.collate import MLMCollator, encode
from robustdebias.config import TrainConfig
from robustdebias.corpus import load_corpus
from robustdebias.groups import group_mask
from robustdebias.losses import build_loss
from robustdebias.modeling import has_adapter, load, masked_lm_inputs, pick_device
from robustdebias.preparation import annotator_for, prepare


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory with a saved model, or its id on the hub")
    parser.add_argument("--corpus", required=True, help="a file with texts")
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)

    model, tokenizer = load(options.model)
    device = pick_device(options.device)
    corpus = prepare(load_corpus(options.corpus), annotator_for("gender,religion"))
    texts, names = encode(corpus.train, tokenizer, max_length=64), corpus.group_names
    counts = group_mask([text.groups for text in texts], names).sum(0).tolist()
    collator = MLMCollator(tokenizer, names)
    config = TrainConfig(objective="group_dro", step_size=0.02)

    model.to(device).train()
    loss_fn = build_loss(config, names, counts, linear=has_adapter(model)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for epoch in range(options.epochs):
        for places in torch.randperm(len(texts)).split(options.batch_size):
            batch = {key: x.to(device) for key, x in collator([texts[i] for i in places], epoch).items()}
            loss = loss_fn(masked_lm_inputs(model, batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}, its last batch:\n{loss_fn.report()}")

    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    return loss_fn


if __name__ == "__main__":
    main()
