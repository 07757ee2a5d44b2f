"""A Parquet listing of images for data.folders, made by Spark.

python examples/spark_listing.py FOLDER OUT.parquet     FOLDER: images with a .txt beside each

In the config: [data] folders = ["OUT.parquet"]
"""

import sys
from pathlib import Path

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

folder, out = (str(Path(argument).resolve()) for argument in sys.argv[1:])
spark = SparkSession.builder.appName("listing").getOrCreate()
files = spark.read.format("binaryFile").option("recursiveFileLookup", "true")
name = F.regexp_replace("path", r"^file:(//)?", "")
key = F.regexp_replace(name, r"\.[^./]*$", "").alias("key")

images = files.option("pathGlobFilter", "*.{jpg,jpeg,png,webp}").load(folder).select(key, name.alias("file"))
texts = files.option("pathGlobFilter", "*.txt").load(folder).select(key, F.trim(F.decode("content", "UTF-8")).alias("caption"))
listing = images.join(texts, "key", "left").select("file", "caption").orderBy("file")
listing.write.mode("overwrite").parquet(out)
print(f"{spark.read.parquet(out).count()} images listed in {out}")
spark.stop()
