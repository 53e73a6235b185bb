//! What opens, and what is refused with which words.

use super::*;
use crate::model::init::{fresh, random_bundle};
use crate::model::{LoadOptions, load};
use half::bf16;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

fn spec() -> Spec {
    Spec {
        layers: 1,
        heads: 2,
        width: 4,
        inner: 8,
        context: 4,
        vocab: 6,
        eps: 1e-5,
        eos: Vec::new(),
        tasks: Vec::new(),
        moe: None,
    }
}

fn bundle() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    random_bundle(dir.path(), &spec(), 1, DType::F32).unwrap();
    dir
}

/// A bundle whose tensors were edited after the fact.
fn edited(edit: impl Fn(&mut HashMap<String, Tensor>)) -> TempDir {
    let dir = bundle();
    let mut tensors = fresh(&spec(), 1).unwrap().into_iter().collect();
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, dir.path().join(FILE)).unwrap();
    dir
}

fn faults(dir: &TempDir) -> Vec<String> {
    Weights::open(dir.path()).unwrap_err().0
}

fn ones(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn prefix_buffers_and_tied_head_are_understood() {
    let dir = edited(|tensors| {
        *tensors = tensors
            .drain()
            .map(|(name, t)| (name.strip_prefix(PREFIX).unwrap().to_owned(), t))
            .collect();
        tensors.insert("h.0.attn.bias".into(), ones(&[1, 1, 4, 4]).to_dtype(DType::U8).unwrap());
        tensors.insert("h.0.attn.masked_bias".into(), ones(&[]));
        tensors.insert(HEAD.into(), tensors["wte.weight"].clone());
    });
    let weights = Weights::open(dir.path()).unwrap();
    let read = weights.var_builder(&Device::Cpu).get((6, 4), TABLE).unwrap();
    let written = &fresh(&spec(), 1).unwrap()[TABLE];
    assert_eq!(read.to_vec2::<f32>().unwrap(), written.to_vec2::<f32>().unwrap());
}

#[test]
fn every_fault_is_named_at_once() {
    let dir = edited(|tensors| {
        tensors.remove("transformer.ln_f.bias");
        tensors.insert("transformer.h.0.ln_1.weight".into(), ones(&[5]));
        tensors.insert("transformer.h.1.ln_1.weight".into(), ones(&[4]));
        tensors.insert("score.weight".into(), ones(&[4]));
        tensors
            .insert("transformer.h.0.ln_2.bias".into(), ones(&[4]).to_dtype(DType::F64).unwrap());
        tensors.insert("wpe.weight".into(), ones(&[4, 4]));
        tensors.insert(HEAD.into(), ones(&[6, 4]));
    });
    let faults = faults(&dir);
    for (name, what) in [
        ("transformer.ln_f.bias", "missing"),
        ("transformer.h.0.ln_1.weight", "shape [5]"),
        ("transformer.h.1.ln_1.weight", "not part"),
        ("score.weight", "not part"),
        ("transformer.h.0.ln_2.bias", "F64"),
        ("transformer.wpe.weight", "twice"),
        (HEAD, "differs"),
    ] {
        let found = faults.iter().any(|f| f.contains(name) && f.contains(what));
        assert!(found, "{name} {what}: {faults:#?}");
    }
    assert_eq!(faults.len(), 7, "{faults:#?}");
}

#[test]
fn config_and_weights_are_faulted_together() {
    let dir = tempfile::tempdir().unwrap();
    let faults = faults(&dir);
    assert!(faults[0].contains("config.json") && faults[1].contains(FILE), "{faults:?}");
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(self::faults(&dir)[1].contains("pickled"));
    fs::write(dir.path().join("model.safetensors.index.json"), "").unwrap();
    assert!(self::faults(&dir)[1].contains("several files"));
}

#[test]
fn an_untied_model_must_bring_an_equal_head() {
    let untie = |dir: &TempDir| {
        let mut config = spec().to_config();
        config["tie_word_embeddings"] = false.into();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    };
    let without = bundle();
    untie(&without);
    assert!(faults(&without)[0].contains("tie_word_embeddings"));
    let with = edited(|tensors| {
        tensors.insert(HEAD.into(), tensors[TABLE].clone());
    });
    untie(&with);
    Weights::open(with.path()).unwrap();
}

#[test]
fn values_that_are_not_finite_are_named() {
    let bias = "transformer.ln_f.bias";
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for poison in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let poisoned = Tensor::new(&[0.0f32, 2.0, poison, -1.0], &Device::Cpu).unwrap();
            let dir = edited(|tensors| {
                tensors.insert(bias.into(), poisoned.to_dtype(dtype).unwrap());
            });
            let faults = Weights::open(dir.path()).unwrap().check_values().unwrap_err().0;
            assert!(faults.len() == 1 && faults[0].contains(bias), "{dtype:?}: {faults:?}");
            assert!(load(dir.path(), &LoadOptions::default()).is_err());
        }
        // The largest, the smallest and zero are numbers.
        let extreme = Tensor::new(&[65504.0f32, -65504.0, 6e-8, -0.0], &Device::Cpu).unwrap();
        let dir = edited(|tensors| {
            tensors.insert(bias.into(), extreme.to_dtype(dtype).unwrap());
        });
        Weights::open(dir.path()).unwrap().check_values().unwrap();
    }
}

#[test]
fn saving_refuses_what_would_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = fresh(&spec(), 1).unwrap();
    tensors.remove(TABLE);
    assert!(save(dir.path(), &spec(), &tensors, DType::F32).is_err());
}

/// A header that promises what the file does not hold.
#[test]
fn hostile_headers_are_faults() {
    let dir = bundle();
    let headers = [
        r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"NOPE","shape":[2],"data_offsets":[0,8]}}"#,
        "[",
        "",
    ];
    for header in headers {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        fs::write(dir.path().join(FILE), bytes).unwrap();
        assert_eq!(faults(&dir).len(), 1, "{header}");
    }
    for length in [u64::MAX, 1 << 40, 9] {
        fs::write(dir.path().join(FILE), length.to_le_bytes()).unwrap();
        assert_eq!(faults(&dir).len(), 1, "{length}");
    }
}

#[test]
fn unaligned_tensors_are_read() {
    let table: Vec<u8> = (0..24).flat_map(|i| bf16::from_f32(i as f32).to_le_bytes()).collect();
    let dir = bundle();
    let path = dir.path().join(FILE);
    let mut views: Vec<(String, TensorView<'_>)> = Vec::new();
    let zeros = vec![0u8; 1 << 10];
    for (name, shape) in spec().tensors() {
        let bytes = 2 * shape.iter().product::<usize>();
        let data = if name == TABLE { &table[..] } else { &zeros[..bytes] };
        views.push((name, TensorView::new(Dtype::BF16, shape, data).unwrap()));
    }
    // One byte more of header shifts every tensor off its alignment.
    let mut bytes = safetensors::serialize(views, None).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    bytes[..8].copy_from_slice(&(header + 1).to_le_bytes());
    bytes.insert(8 + header as usize, b' ');
    fs::write(path, bytes).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    assert_eq!(weights.dtype(), DType::BF16);
    let read = weights.var_builder(&Device::Cpu).get((6, 4), TABLE).unwrap();
    let expected: Vec<f32> = (0..24).map(|i| i as f32).collect();
    assert_eq!(read.flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to a file, it opens or it is refused; it never panics.
    #[test]
    fn damage_never_panics(
        cut in 0usize..4000,
        edits in prop::collection::vec((0usize..2000, any::<u8>()), 0..6),
    ) {
        let dir = bundle();
        let path = dir.path().join(FILE);
        let mut bytes = fs::read(&path).unwrap();
        for (at, byte) in edits {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        bytes.truncate(bytes.len().saturating_sub(cut % bytes.len()));
        fs::write(&path, bytes).unwrap();
        if let Ok(weights) = Weights::open(dir.path()) {
            let _ = weights.check_values();
        }
    }
}
