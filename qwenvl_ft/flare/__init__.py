"""The 19 data sets of FLARE25's 2D multimodal task: catalog, conversion to records, prediction and scoring."""
