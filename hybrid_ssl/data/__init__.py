"""Sources -> samples -> views -> masks -> `Batch`.

`sources` opens anything a recipe may name (`files`, `tables`, `tars`, `streams`); `order` says which images a step
holds; `samples` reads them (`decode`), cuts them (`views`, `colour`) and draws masks (`masks`); `loader` does that in
workers. `stats` and `labelled` read fixed samples, for the normalisation and the probe.
"""
