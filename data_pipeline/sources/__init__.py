"""Where pictures, captions and labels come from: five layouts, one numbered list of items each.

A source is listed once, in an order that depends on its names alone, and read by number afterwards. So a run
can be cut into fixed parts, started again, or spread over processes without anybody passing state around.

| kind | what lies there |
|---|---|
| folder | pictures with `.txt` or `.json` beside them |
| list | a `.jsonl` or `.parquet` file: path (parquet: or picture), caption(s) or label, further columns; or a
         folder as Hugging Face has them: `metadata.jsonl` beside the pictures, or parquet files alone |
| webdataset | `*.tar` shards with jpg/png/webp/... and txt/json/cls members |
| tim_toy | the toy set of TiM: `data_info.jsonl` (`image_file`, `bucket`, `captions`) and its pictures |
| tim_latents | latents of TiM: `<wnid>/<name>.safetensors`, each `latent` [2, C, h, w] and `label` |
"""

from data_pipeline.sources.item import BAD_CAPTION, BAD_LABEL, Item
from data_pipeline.sources.layout import KINDS, Source, detect_kind, open_source
from data_pipeline.sources.listing import hash_file

__all__ = ["BAD_CAPTION", "BAD_LABEL", "KINDS", "Item", "Source", "detect_kind", "hash_file", "open_source"]
