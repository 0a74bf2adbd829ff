//! Model files that are damaged, hostile or of another kind are refused by name and reason.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use engine::{Engine, Error, Event, Held, LocalFiles, NoPeers, Options, describe, load};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::support::{ask_alone, block_on, greedy, model, options, telling, whole, widened};

/// A copy of a small good model.
fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(model("yarn").join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn refusal(dir: &Path) -> String {
    let loaded = load(dir, &Held::all(), &options(), &mut |_, _| {}).map(|_| ()).unwrap_err();
    let described = describe(&LocalFiles(dir.into())).unwrap_err();
    let chain = |error: &Error| match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    assert_eq!(chain(&loaded), chain(&described));
    chain(&loaded)
}

/// Changes fields of the configuration.
fn configured(fields: Value) -> TempDir {
    let dir = copy();
    let path = dir.path().join("config.json");
    let mut config: Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (name, value) in fields.as_object().unwrap() {
        config.insert(name.clone(), value.clone());
    }
    fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    dir
}

#[test]
fn configurations_are_refused_with_field_value_and_what_is_accepted() {
    let huge = 1_000_000_000u64;
    for (fields, words) in [
        (
            json!({"architectures": ["LlamaForCausalLM"]}),
            "architectures is [\"LlamaForCausalLM\"]; it must be [\"DeepseekV3ForCausalLM\"]",
        ),
        (json!({"architectures": []}), "architectures is []; it must be"),
        (json!({"architectures": null}), "architectures is null; it must be"),
        (json!({"hidden_size": 0}), "hidden_size is 0; it must be a whole number from 1 to 1048576"),
        (json!({"hidden_size": huge}), "hidden_size is 1000000000; it must be"),
        (json!({"hidden_size": -1}), "hidden_size is -1; it must be"),
        (json!({"hidden_size": "44"}), "hidden_size is \"44\"; it must be"),
        (json!({"hidden_size": null}), "hidden_size is missing"),
        (
            json!({"hidden_size": 45}),
            "model.safetensors: tensor model.embed_tokens.weight: has shape [61, 44]; config.json asks for [61, 45]",
        ),
        (json!({"vocab_size": 62}), "has shape [61, 44]; config.json asks for [62, 44]"),
        (json!({"num_hidden_layers": huge}), "num_hidden_layers is 1000000000"),
        (json!({"num_hidden_layers": 4000}), "tensor model.layers.3.mlp.gate.weight: missing"),
        (
            json!({"num_hidden_layers": 2}),
            "num_hidden_layers is 2 and num_nextn_predict_layers 0; the weight files have a layer 2, counted from 0",
        ),
        (json!({"n_routed_experts": huge}), "n_routed_experts is 1000000000"),
        (json!({"n_routed_experts": 60_000}), "mlp.gate.weight: has shape [8, 44]; config.json asks for [60000, 44]"),
        (json!({"n_group": 3}), "n_group is 3; it must be a divisor of n_routed_experts, which is 8"),
        (json!({"topk_group": 3}), "topk_group is 3; it must be a whole number from 1 to 2"),
        (json!({"num_experts_per_tok": 5}), "num_experts_per_tok is 5; it must be a whole number from 1 to 4"),
        (json!({"n_group": null}), "n_group is null; it must be a whole number from 1 to 4"),
        (json!({"topk_group": null}), "topk_group is null; it must be a whole number from 1 to 2"),
        (json!({"first_k_dense_replace": null}), "first_k_dense_replace is null; it must be a whole number"),
        (json!({"num_attention_heads": 0}), "num_attention_heads is 0"),
        (json!({"num_key_value_heads": 1}), "num_key_value_heads is 1; it must be 3"),
        (json!({"qk_rope_head_dim": 9}), "qk_rope_head_dim is 9; it must be even"),
        (json!({"kv_lora_rank": 24}), "kv_b_proj.weight: has shape [60, 23]; config.json asks for [60, 24]"),
        (json!({"q_lora_rank": null}), "tensor model.layers.0.self_attn.q_proj.weight: missing"),
        (json!({"attention_bias": "yes"}), "attention_bias is \"yes\"; it must be true or false"),
        (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\"; it must be \"silu\""),
        (json!({"torch_dtype": "float8_e4m3fn"}), "torch_dtype is \"float8_e4m3fn\"; it must be \"bfloat16\" or"),
        (
            json!({"quantization_config": {"quant_method": "fp8"}}),
            "quantization_config.quant_method is \"fp8\"; it must be absent",
        ),
        (
            json!({"rope_scaling": {"type": "llama3", "factor": 2.0}}),
            "rope_scaling.type is \"llama3\"; it must be \"default\" or \"yarn\"",
        ),
        (json!({"rope_scaling": {"type": "yarn"}}), "rope_scaling.factor is missing"),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 0.0}}),
            "rope_scaling.factor is 0.0; it must be a number above 0",
        ),
        (json!({"rope_parameters": "yarn"}), "rope_parameters is \"yarn\"; it must be an object"),
        (json!({"rope_theta": -1.0}), "rope_theta is -1.0"),
        (json!({"rms_norm_eps": 1e300}), "rms_norm_eps is 1e+300"),
    ] {
        let found = refusal(configured(fields).path());
        assert!(found.contains(words), "{found}\n  should contain\n{words}");
    }
}

#[test]
fn code_pointers_and_unknown_fields_are_ignored() {
    let dir = configured(json!({"auto_map": {"AutoModel": "evil.Model"}, "new_field": [1, 2]}));
    assert!(describe(&LocalFiles(dir.path().into())).is_ok());
}

#[test]
fn both_spellings_give_the_same_model() {
    let scaling = json!({
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 5.0,
        "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 0.7,
    });
    let fields = json!({
        "torch_dtype": null, "dtype": "float32", "rope_theta": null, "rope_scaling": null,
        "rope_parameters": scaling,
    });
    let request = telling(&(0..60).collect::<Vec<u32>>(), 3);
    let old = ask_alone(&mut whole(&model("yarn"), &options()), &request);
    let new = ask_alone(&mut whole(configured(fields).path(), &options()), &request);
    assert!(old == new);
    let unstretched = configured(json!({"rope_scaling": null}));
    assert!(old != ask_alone(&mut whole(unstretched.path(), &options()), &request));
}

#[test]
fn a_flag_that_is_null_is_false_as_in_the_reference() {
    let request = telling(&(0..20).collect::<Vec<u32>>(), 1);
    let answer = |fields| ask_alone(&mut whole(configured(fields).path(), &options()), &request);
    for name in ["norm_topk_prob", "rope_interleave"] {
        assert!(answer(json!({name: null})) == answer(json!({name: false})), "{name}");
        assert!(answer(json!({name: null})) != answer(json!({})), "{name}");
    }
}

/// The first experts of each layer in one tensor a matrix, as transformers 5 keeps them.
fn stacked(experts: usize) -> TempDir {
    let bytes = fs::read(model("yarn").join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut stacks: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, view) in tensors.iter().filter(|(name, _)| !name.contains(".experts.")) {
        stacks.insert(name.into(), (view.shape().to_vec(), view.data().to_vec()));
    }
    for layer in 1..3 {
        let prefix = format!("model.layers.{layer}.mlp.experts");
        for (stack, matrices) in [("gate_up_proj", &["gate_proj", "up_proj"][..]), ("down_proj", &["down_proj"])] {
            let mut data = Vec::new();
            let mut shape = Vec::new();
            for expert in 0..experts {
                for matrix in matrices {
                    let view = tensors.tensor(&format!("{prefix}.{expert}.{matrix}.weight")).unwrap();
                    data.extend_from_slice(view.data());
                    shape = vec![experts, matrices.len() * view.shape()[0], view.shape()[1]];
                }
            }
            stacks.insert(format!("{prefix}.{stack}"), (shape, data));
        }
    }
    let dir = copy();
    let view = |(shape, data)| TensorView::new(Dtype::F32, Vec::clone(shape), data).unwrap();
    let views = stacks.iter().map(|(name, (shape, data))| (name, view((shape, data))));
    serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    dir
}

#[test]
fn stacked_experts_are_the_same_model() {
    let dir = stacked(8);
    let request = telling(&(0..60).collect::<Vec<u32>>(), 3);
    let expected = ask_alone(&mut whole(&model("yarn"), &options()), &request);
    assert!(ask_alone(&mut whole(dir.path(), &options()), &request) == expected);
    let described = |dir: &Path| describe(&LocalFiles(dir.into())).unwrap();
    assert_eq!(described(dir.path()), described(&model("yarn")));
}

#[test]
fn a_stack_that_lacks_an_expert_is_refused() {
    let words =
        "model.safetensors: tensor model.layers.1.mlp.experts.gate_up_proj: has 7 experts, so there is no expert 7";
    assert_eq!(refusal(stacked(7).path()), words);
}

#[test]
fn a_configuration_that_is_no_configuration_is_refused() {
    for (text, words) in [
        ("", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("{\"architectures\": ", "not a JSON object"),
        (&"[".repeat(100_000), "not a JSON object"),
        (&" ".repeat(2 << 20), "has 2097152 bytes; at most 1048576"),
    ] {
        let dir = copy();
        fs::write(dir.path().join("config.json"), text).unwrap();
        let found = refusal(dir.path());
        assert!(found.contains(words), "{found}\n  should contain\n{words}");
    }
    let dir = copy();
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert_eq!(refusal(dir.path()), "config.json: missing");
}

/// Writes a safetensors file with this header before the good one's bytes.
fn with_header(change: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) -> TempDir {
    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    change(&mut header, &mut data);
    write_raw(&path, &serde_json::to_string(&header).unwrap(), &data);
    dir
}

fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length[..], header.as_bytes(), data].concat()).unwrap();
}

const NORM: &str = "model.norm.weight";

/// Changes one field of the entry of the last norm, 44 values of f32.
fn with_norm(field: &'static str, value: Value) -> TempDir {
    with_header(move |header, _| header[NORM][field] = value)
}

#[test]
fn headers_are_refused_with_file_tensor_and_reason() {
    let offsets = |first: u64, last: u64| with_norm("data_offsets", json!([first, last]));
    let end = |change: i64| {
        with_header(move |_, data| {
            data.resize((data.len() as i64 + change) as usize, 0);
        })
    };
    for (dir, words) in [
        (with_norm("shape", json!([45])), "tensor model.norm.weight: F32 of shape [45] is not 176 bytes"),
        (with_norm("shape", json!([u64::MAX, 2])), "is not 176 bytes"),
        (with_norm("shape", json!([4, 11])), "has shape [4, 11]; config.json asks for [44]"),
        (with_norm("shape", json!([-44])), "tensor model.norm.weight: invalid value"),
        (with_norm("dtype", json!("F99")), "tensor model.norm.weight: unknown variant `F99`"),
        (with_norm("dtype", json!("I32")), "tensor model.norm.weight: is of type I32; BF16, F16 and F32 are accepted"),
        (with_norm("dtype", json!("F16")), "F16 of shape [44] is not 176 bytes"),
        (offsets(0, 176), "its bytes overlap those of"),
        (offsets(176, 0), "its bytes end at 0, before their start at 176"),
        (offsets(u64::MAX - 176, u64::MAX), "; the file has 260388 for tensors"),
        (
            with_header(|header, _| {
                header.remove(NORM);
            }),
            "bytes belong to no tensor",
        ),
        (
            with_header(|header, _| {
                let norm = header.remove(NORM).unwrap();
                header.insert("model.norm.weigth".into(), norm);
            }),
            "model.safetensors: tensor model.norm.weight: missing",
        ),
        (end(-1), "; the file has 260387 for tensors"),
        (end(7), "its last 7 bytes belong to no tensor"),
    ] {
        let found = refusal(dir.path());
        assert!(found.contains(words), "{found}\n  should contain\n{words}");
    }
}

#[test]
fn files_that_are_no_safetensors_are_refused() {
    let entry = "{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}";
    let raw = |header: &str, data: &[u8]| {
        let dir = copy();
        write_raw(&dir.path().join("model.safetensors"), header, data);
        dir
    };
    let bytes = |bytes: &[u8]| {
        let dir = copy();
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        dir
    };
    for (dir, words) in [
        (raw(&format!("{{\"a\":{entry},\"a\":{entry}}}"), &[0]), "tensor a: named twice"),
        (raw("[1, 2]", &[]), "header is not a JSON object of tensors"),
        (raw("{\"a\":", &[]), "header is not a JSON object of tensors"),
        (raw("{\"a\":7}", &[]), "tensor a: invalid type"),
        (bytes(&[]), "model.safetensors: 0 bytes are too few for a header"),
        (bytes(&[1, 2, 3]), "3 bytes are too few for a header"),
        (bytes(&u64::MAX.to_le_bytes()), "header says it has 18446744073709551615 bytes; at most 33554432"),
        (bytes(&[0, 0, 0, 1, 0, 0, 0, 0]), "header says it has 16777216 bytes; the file has 8"),
        (bytes(b"version https://git-lfs.github.com/spec/v1\n"), "header says it has"),
    ] {
        let found = refusal(dir.path());
        assert!(found.contains(words), "{found}\n  should contain\n{words}");
    }
}

const INDEX: &str = "model.safetensors.index.json";

/// Two files and their index: the first has everything, the second one tensor more.
fn indexed(change: impl FnOnce(&mut Map<String, Value>, &Path)) -> TempDir {
    let dir = copy();
    let path = dir.path();
    fs::rename(path.join("model.safetensors"), path.join("one.safetensors")).unwrap();
    let second = "{\"extra\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}";
    write_raw(&path.join("two.safetensors"), second, &[0]);
    let mut map = Map::new();
    for tensor in [NORM, "lm_head.weight"] {
        map.insert(tensor.into(), json!("one.safetensors"));
    }
    map.insert("extra".into(), json!("two.safetensors"));
    change(&mut map, path);
    fs::write(path.join(INDEX), json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    dir
}

#[test]
fn an_index_and_its_files_must_agree() {
    let good = indexed(|_, _| {});
    assert!(describe(&LocalFiles(good.path().into())).is_ok());
    fs::remove_file(good.path().join(INDEX)).unwrap(); // without it, all there are
    assert!(describe(&LocalFiles(good.path().into())).is_ok());
    let moved = |tensor: &'static str, file: &'static str| {
        indexed(move |map, _| {
            map.insert(tensor.into(), json!(file));
        })
    };
    for (dir, words) in [
        (moved("extra", "one.safetensors"), "tensor extra: listed in one.safetensors, which does not hold it"),
        (moved("extra", "three.safetensors"), "names three.safetensors, which is missing"),
        (moved("extra", "../two.safetensors"), "names \"../two.safetensors\"; files beside it are accepted"),
        (moved(NORM, "two.safetensors"), "listed in two.safetensors; it is in one.safetensors"),
        (
            indexed(|_, path| {
                fs::copy(path.join("one.safetensors"), path.join("two.safetensors")).unwrap();
            }),
            "two.safetensors: tensor",
        ),
    ] {
        let found = refusal(dir.path());
        assert!(found.contains(words), "{found}\n  should contain\n{words}");
    }
    let dir = indexed(|_, _| {});
    fs::write(dir.path().join(INDEX), "{}").unwrap();
    assert!(refusal(dir.path()).contains("not an index: missing field `weight_map`"));
}

#[test]
fn pickles_are_never_opened() {
    let dir = copy();
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("pytorch_model.bin")).unwrap();
    let words = "model.safetensors: missing; pytorch_model.bin is not opened, as it can hold code";
    assert_eq!(refusal(dir.path()), words);
    fs::remove_file(dir.path().join("pytorch_model.bin")).unwrap();
    let words = "model.safetensors: missing; weights are read from *.safetensors";
    assert_eq!(refusal(dir.path()), words);
}

#[test]
fn layers_that_predict_further_tokens_are_ignored() {
    let request = telling(&[1, 2, 3], 2);
    let expected = ask_alone(&mut whole(&model("yarn"), &options()), &request);
    let dir = configured(json!({"num_nextn_predict_layers": 1})); // named, and not in the file
    assert!(ask_alone(&mut whole(dir.path(), &options()), &request) == expected);
    let extra = with_header(|header, data| {
        let (first, last) = (data.len(), data.len() + 4);
        let entry = json!({"dtype": "F32", "shape": [1], "data_offsets": [first, last]});
        header.insert("model.layers.3.eh_proj.weight".into(), entry);
        data.extend([0; 4]);
    });
    fs::copy(dir.path().join("config.json"), extra.path().join("config.json")).unwrap();
    assert!(ask_alone(&mut whole(extra.path(), &options()), &request) == expected);
}

#[test]
fn tiny_r1_is_described() {
    let description = describe(&LocalFiles(model("tiny-r1"))).unwrap();
    let json = serde_json::to_value(&description).unwrap();
    let moe_layers = [1, 2, 3].map(|layer| json!({"layer": layer, "expertBytes": 98_304}));
    let expected = json!({
        "architecture": "DeepseekV3ForCausalLM", "dtype": "bf16", "parameters": 3_627_952,
        "denseBytes": 7_255_904 - 3 * 16 * 98_304, "kvBytesPerToken": 4 * (64 + 16) * 4,
        "maxContextTokens": 1024, "vocabSize": 512, "hiddenSize": 256, "layers": 4, "experts": 16,
        "expertsPerToken": 4,
        "moeLayers": moe_layers,
        "resolvedRevision": "", "contentHash": "", "files": [],
    });
    assert_eq!(json, expected);
}

#[test]
fn placements_and_options_that_do_not_fit_are_refused() {
    let dir = model("tiny-r1");
    let held = |layer, expert| Held::from_layers([(layer, [expert].into())].into());
    let refused =
        |held: &Held, options: &Options| load(&dir, held, options, &mut |_, _| {}).map(|_| ()).unwrap_err().to_string();
    assert_eq!(refused(&held(0, 0), &options()), "placement: layer 0 has no routed experts");
    let words = "placement: layer 1 has 16 experts, so there is no expert 16";
    assert_eq!(refused(&held(1, 16), &options()), words);
    let all = Held::all();
    for (options, words) in [
        (Options { kv_cache_tokens: 0, ..options() }, "kv_cache_tokens is 0; use at least 1"),
        (Options { max_sequences: 0, ..options() }, "max_sequences is 0; use at least 1"),
        (Options { prefill_chunk: 0, ..options() }, "prefill_chunk is 0; use at least 1"),
        (
            Options { max_context_tokens: Some(1025), ..options() },
            "max_context_tokens is 1025; the model takes 1 to 1024",
        ),
    ] {
        assert_eq!(refused(&all, &options), words);
    }
    let huge = Options { kv_cache_tokens: usize::MAX, max_sequences: usize::MAX, ..options() };
    assert!(load(&dir, &all, &huge, &mut |_, _| {}).is_ok(), "memory is taken when it is used");
}

#[test]
fn logits_that_are_no_numbers_fail_their_sequence_loudly() {
    let dir = widened(&model("yarn"));
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let offset = header["lm_head.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + length + offset..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let mut engine = whole(dir.path(), &options());
    let id = engine.submit(greedy(&[3, 4], 5)).unwrap();
    let events = block_on(engine.step(&mut NoPeers)).unwrap();
    let [Event::Failed { sequence, error }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(*sequence, id);
    let words = "logits of position 2 hold 1 values that are not numbers";
    assert_eq!(error.to_string(), words);
    assert!(engine.is_idle() && engine.load().kv_tokens_used == 0);
}
