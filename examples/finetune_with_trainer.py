"""Fine-tune a masked language model with Group DRO in the Trainer of transformers.

    accelerate launch examples/finetune_with_trainer.py --model DIR --corpus FILE --out DIR

One process or several; groups are the demographic words that a text mentions.
"""

import argparse

from transformers import TrainingArguments

from robustdebias.collate import MLMCollator, encode
from robustdebias.config import OBJECTIVES, TrainConfig
from robustdebias.corpus import load_corpus
from robustdebias.groups import group_mask
from robustdebias.modeling import load
from robustdebias.preparation import annotator_for, prepare
from robustdebias.trainer import RobustDebiasTrainer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory with a saved model, or its id on the hub")
    parser.add_argument("--corpus", required=True, help="a file with texts")
    parser.add_argument("--out", required=True)
    parser.add_argument("--groups", default="gender,religion", help="lexicons, separated by commas")
    parser.add_argument("--objective", default="group_dro", choices=OBJECTIVES)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16, help="texts of a batch, in each process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--min-texts", type=int, default=20, help="smaller groups become part of 'other'")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)

    model, tokenizer = load(options.model)
    corpus = prepare(load_corpus(options.corpus), annotator_for(options.groups), min_texts=options.min_texts)
    train, held_out = (
        encode(side, tokenizer, options.max_length) for side in (corpus.train, corpus.held_out)
    )
    counts = group_mask([text.groups for text in train], corpus.group_names).sum(0).tolist()

    trainer = RobustDebiasTrainer(
        model,
        TrainingArguments(
            options.out,
            remove_unused_columns=False,  # the groups are no argument of the model
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=1e-4,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=10,
            report_to=options.report_to,
            use_cpu=options.cpu,
        ),
        data_collator=MLMCollator(tokenizer, corpus.group_names),
        group_names=corpus.group_names,
        group_counts=counts,
        config=TrainConfig(objective=options.objective),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    trainer.accelerator.end_training()  # several processes part in good order


if __name__ == "__main__":
    main()
