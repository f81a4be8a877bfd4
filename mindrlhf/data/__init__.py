"""Preference data: files of pairs in, packed rows of tokens with reference log-probs out.

preprocess.py takes a pair through these modules:

sources     reads JSON rows, each with its file and line, from .jsonl and .json files, plain or gzip
formats     parses a row of any supported dataset type into a conversation and its two answers
preference  collects the pairs, counts bad and repeated rows, and picks the evaluation set
features    tokenizes a pair, truncates its prompt, and lays out the tokens of a row
reference   scores pairs with the model as it is before training; parts stores the results on disk
groups      finds equal prompts and equal answers, which are computed once
packing     decides which groups share a row
merge       joins the parts of all workers into the training and the evaluation file
mindrecord  builds a row, and writes and reads the file and its sidecar
dataset     feeds the file to training in batches

show and validation print and check a file, summary reports on a run, samples makes example pairs.
"""
