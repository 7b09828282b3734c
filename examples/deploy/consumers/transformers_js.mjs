// Transformers.js, from Node: four pipelines.
import { readFileSync } from "node:fs";
import { env, pipeline } from "@huggingface/transformers";

const [root, expected] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = root;
const { texts } = JSON.parse(readFileSync(expected));
const make = (task) => pipeline(task, task, { dtype: "fp32" });
const found = {};

const embeddings = await (await make("feature-extraction"))(texts, { pooling: "mean", normalize: true });
found["feature-extraction"] = Array.from(embeddings.data);
const classes = await (await make("text-classification"))(texts);
found["text-classification"] = classes.map((one) => one.score);
const tokens = await (await make("token-classification"))(texts[0], { ignore_labels: [] });
found["token-classification"] = tokens.map((one) => one.score);
const answer = await (await make("question-answering"))(texts[0], texts[1]);
const start = texts[1].toLowerCase().indexOf(answer.answer.toLowerCase());
found["question-answering"] = [start, start + answer.answer.length];
console.log(JSON.stringify(found));
