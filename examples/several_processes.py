"""Group DRO on several processes, which may die: DistributedDataParallel, torchrun's restarts, checkpoints.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/several_processes.py --out run

trains a tiny BERT on made-up sentences in a few seconds; --model and --corpus take real ones. When a process dies,
torchrun starts all of them again, and they go on after the last checkpoint; so does the same command, given again.
"""

import argparse
import os
from contextlib import nullcontext
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

import rd_kernels as rd
from robustdebias.checkpoint import RunDirectory
from robustdebias.collate import MLMCollator, encode
from robustdebias.corpus import Example, load_corpus
from robustdebias.groups import group_mask
from robustdebias.modeling import fingerprint, has_adapter, load, masked_lm_inputs
from robustdebias.preparation import annotator_for, prepare
from robustdebias.sampling import BatchStream, derived_seed


class LossInputs(torch.nn.Module):
    """From a batch to what the loss takes, as a forward: DDP averages the gradients of what it called itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        inputs = masked_lm_inputs(self.model, batch)
        return inputs.hidden, inputs.weight, inputs.labels, inputs.groups, inputs.bias


def made_up_sentences() -> list[Example]:
    who = "the man", "her mother", "a Christian author", "a Muslim woman", "the teacher"
    does = (
        "reads a letter",
        "sells the bread",
        "sees a house",
        "likes the work",
        "finds some water",
        "makes it",
    )
    where = "in the city", "near the river", "at home", "after dinner", "on Monday", "with a friend"
    return [Example(text, document=text) for text in map(" ".join, product(who, does, where))]


def tiny_bert(examples: list[Example]):
    """A BERT with random weights and a tokenizer that knows the words of these texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    words = sorted({word for example in examples for word in example.text.split()})
    vocabulary = {word: number for number, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = BertConfig(
        vocab_size=len(vocabulary), num_hidden_layers=2, hidden_size=64, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return BertForMaskedLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def backward(inputs, loss_fn, batches: list[dict], seeds: list[int]) -> torch.Tensor:
    """The gradients of one step -> its loss, that of all ranks' batches as of one: the same number on each rank."""

    def run(k):
        torch.manual_seed(seeds[k])  # a batch that is run twice has the same dropout masks twice
        return inputs(batches[k])

    losses = []
    with nullcontext() if len(batches) == 1 else loss_fn.accumulate() as window:
        if window is not None:
            with torch.no_grad():
                for k in range(len(batches)):
                    window.observe(*run(k))
        for k in range(len(batches)):
            with nullcontext() if k == len(batches) - 1 else inputs.no_sync():
                losses.append(loss_fn(*run(k)))
                losses[-1].backward()
    return torch.stack(losses).detach().sum()


def load_checkpoint(run: RunDirectory, ranks: int) -> dict | None:
    """The last one, or None. ValueError if it is of another number of ranks: their shares of a batch, and with them
    dropout masks and roundings, would not be those of the run that it is to continue."""
    state = run.load_checkpoint()
    if state is not None and state["ranks"] != ranks:
        raise ValueError(
            f"{run.checkpoint} was written by {state['ranks']} ranks, but this run has {ranks}: start "
            f"{state['ranks']}, or take another --out"
        )
    return state


def join(backend: str, timeout: timedelta) -> tuple[int, int]:
    """init_process_group -> rank, ranks. torchrun's store outlives the processes that it starts: without a name of its
    own an attempt may find the addresses of the dead there, and waits for them (pytorch issue 135712)."""
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    return rank, ranks


@record  # torchrun's summary then says what was raised
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", help="a directory with a saved model, or its id on the hub")
    parser.add_argument("--corpus", help="a file with texts")
    parser.add_argument("--groups", default="gender,religion", help="lexicons, separated by commas")
    parser.add_argument("--min-texts", type=int, default=20, help="smaller groups become part of 'other'")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16, help="texts of a batch, in each process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--step-size", type=float, default=0.05, help="of the group weights")
    parser.add_argument("--save-every", type=int, default=10, help="steps from one checkpoint to the next")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a rank waits for the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available() and not options.cpu
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    rank, ranks = join("nccl" if on_gpu else "gloo", timedelta(seconds=options.timeout))

    # Everything that is drawn depends on the seed and on the place in the run, never on what was drawn before: so the
    # ranks agree, and a run that was resumed goes on as if nothing had happened.
    torch.manual_seed(derived_seed(options.seed, "model"))
    examples = load_corpus(options.corpus) if options.corpus else made_up_sentences()
    model, tokenizer = load(options.model) if options.model else tiny_bert(examples)
    if not has_adapter(model):
        parser.error(f"--model: no adapter for the decoder of {model.config.model_type}")
    corpus = prepare(examples, annotator_for(options.groups), min_texts=options.min_texts)
    texts, names = encode(corpus.train, tokenizer, max_length=64), corpus.group_names
    of_text = group_mask([text.groups for text in texts], names)
    stream = BatchStream(of_text, options.batch_size * ranks, options.seed)
    collator = MLMCollator(tokenizer, names, seed=options.seed)

    inputs = DistributedDataParallel(LossInputs(model.to(device).train()))
    loss_fn = rd.LinearGroupDROLoss(
        len(names), rd.GroupDRO(options.step_size), group_names=names, process_group=dist.group.WORLD
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    (run := RunDirectory(options.out)).path.mkdir(parents=True, exist_ok=True)
    done, loss = 0, float("nan")
    if (state := load_checkpoint(run, ranks)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loss_fn.load_state_dict(state["loss_fn"])
        done, loss = state["step"], state["loss"]
        if rank == 0:
            print(f"resumed after step {done}", flush=True)

    for step in range(done + 1, options.steps + 1):
        batches = []
        for number in range((step - 1) * options.accumulate, step * options.accumulate):
            epoch, places = stream.batch(number)
            own = places[rank::ranks]
            mine = collator([texts[place] for place in own or places[:1]], epoch)
            if not own:  # an epoch's last batch may have fewer texts than there are ranks: one without labels
                mine |= {"labels": torch.full_like(mine["labels"], -100), "positions": mine["positions"][:0]}
            batches.append({key: tensor.to(device) for key, tensor in mine.items()})

        seeds = [derived_seed(options.seed, "dropout", step, k, rank) for k in range(len(batches))]
        loss_of_step = backward(inputs, loss_fn, batches, seeds)
        optimizer.step()
        optimizer.zero_grad()

        if step % options.save_every == 0 or step == options.steps:
            loss = loss_of_step.item()
            if rank == 0:
                run.save_checkpoint({
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss_fn": loss_fn.state_dict(),
                    "step": step, "loss": loss, "ranks": ranks,
                })  # fmt: skip
                print(f"step {step}: loss {loss:.4f}", flush=True)

    if rank == 0:
        weights = dict(zip(names, loss_fn.group_weights.tolist(), strict=True))
        print(f"finished: loss {loss!r}, q {weights}, parameters {fingerprint(model)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
