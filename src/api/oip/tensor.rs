//! Tensors: typed elements with a shape, in JSON or in bytes (little-endian, row-major; each element of
//! `BYTES` is its length as 4 bytes, then itself).

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json as value};
use std::fmt;

/// The types of elements that this server reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs)]
pub enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp32,
    Fp64,
    Bytes,
}

/// A tensor whose shape and elements agree.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// What each element is.
    pub datatype: Datatype,
    /// How many elements there are along each dimension.
    pub shape: Vec<u64>,
    /// Strings for `BYTES`, else numbers or booleans.
    pub data: Vec<Value>,
}

/// What is known of a tensor before its elements are.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its name.
    pub name: String,
    /// What each element is.
    pub datatype: Datatype,
    /// How many elements there are along each dimension.
    pub shape: Vec<u64>,
}

impl Head {
    /// A complaint about this tensor.
    pub fn fault(&self, what: impl fmt::Display) -> Error {
        Error::invalid(&self.name, format!("tensor {}: {what}", self.name))
    }

    /// The tensor with these elements.
    pub fn with(self, data: Vec<Value>) -> Result<Tensor> {
        let fits = |element: &Value| match self.datatype {
            Datatype::Bool => element.is_boolean(),
            Datatype::Bytes => element.is_string(),
            Datatype::Fp32 | Datatype::Fp64 => element.is_number(),
            _ => element.is_i64() || element.is_u64(),
        };
        if let Some(other) = data.iter().find(|element| !fits(element)) {
            return Err(self.fault(format!("an element of {} is {other}", self.datatype)));
        }
        let count = self.shape.iter().try_fold(1, |count: u64, size| count.checked_mul(*size));
        if count != Some(data.len() as u64) {
            let message =
                format!("its shape is {:?}, but it has {} elements", self.shape, data.len());
            return Err(self.fault(message));
        }
        Ok(Tensor { name: self.name, datatype: self.datatype, shape: self.shape, data })
    }

    /// The tensor with the elements of a JSON array, nested or flat.
    pub fn with_json(self, data: Value) -> Result<Tensor> {
        let mut flat = Vec::new();
        match data {
            Value::Array(list) => flatten(list, &mut flat),
            _ => return Err(self.fault("data must be an array")),
        }
        self.with(flat)
    }

    /// The tensor with the elements that these bytes are.
    pub fn with_bytes(self, bytes: &[u8]) -> Result<Tensor> {
        let elements = match self.datatype.size() {
            None => strings(bytes),
            Some(size) if bytes.len().is_multiple_of(size) => {
                bytes.chunks_exact(size).map(|element| self.datatype.element(element)).collect()
            }
            Some(_) => None,
        };
        let message = || format!("{} bytes are no elements of {}", bytes.len(), self.datatype);
        match elements {
            Some(data) => self.with(data),
            None => Err(self.fault(message())),
        }
    }
}

impl Tensor {
    /// A tensor of strings.
    pub fn strings(name: &str, shape: Vec<u64>, data: impl Iterator<Item = String>) -> Self {
        let data = data.map(Value::String).collect();
        Self { name: name.to_owned(), datatype: Datatype::Bytes, shape, data }
    }

    /// The elements of a tensor of strings.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.data.iter().filter_map(Value::as_str)
    }

    /// The elements of a tensor of strings as bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for text in self.texts() {
            bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes
    }

    /// The tensor in JSON; where its elements follow as bytes, with their number instead.
    pub fn json(&self, binary: Option<usize>) -> Value {
        let mut json = value!({"name": self.name, "datatype": self.datatype, "shape": self.shape});
        match binary {
            Some(size) => json["parameters"] = value!({"binary_data_size": size}),
            None => json["data"] = value!(self.data),
        }
        json
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_ascii_uppercase())
    }
}

impl Datatype {
    /// Bytes of one element; those of `BYTES` say it themselves.
    fn size(self) -> Option<usize> {
        Some(match self {
            Self::Bytes => return None,
            Self::Bool | Self::Uint8 | Self::Int8 => 1,
            Self::Uint16 | Self::Int16 => 2,
            Self::Uint32 | Self::Int32 | Self::Fp32 => 4,
            Self::Uint64 | Self::Int64 | Self::Fp64 => 8,
        })
    }

    /// The element that these bytes are; `None` for what JSON cannot say (NaN, infinity).
    fn element(self, bytes: &[u8]) -> Option<Value> {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        let float = |value: f64| serde_json::Number::from_f64(value).map(Value::Number);
        Some(match self {
            Self::Bytes => return None,
            Self::Bool => Value::Bool(unsigned != 0),
            Self::Uint8 | Self::Uint16 | Self::Uint32 | Self::Uint64 => unsigned.into(),
            Self::Int8 => (unsigned as i8).into(),
            Self::Int16 => (unsigned as i16).into(),
            Self::Int32 => (unsigned as i32).into(),
            Self::Int64 => (unsigned as i64).into(),
            Self::Fp32 => return float(f32::from_bits(unsigned as u32).into()),
            Self::Fp64 => return float(f64::from_bits(unsigned)),
        })
    }
}

fn flatten(list: Vec<Value>, flat: &mut Vec<Value>) {
    for value in list {
        match value {
            Value::Array(inner) => flatten(inner, flat),
            element => flat.push(element),
        }
    }
}

/// The elements of `BYTES`, if these are some and all of them are UTF-8.
fn strings(mut bytes: &[u8]) -> Option<Vec<Value>> {
    let mut all = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        all.push(std::str::from_utf8(text).ok()?.into());
        bytes = rest;
    }
    bytes.is_empty().then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(datatype: &str, shape: &[u64]) -> Head {
        let datatype = serde_json::from_value(value!(datatype)).unwrap();
        Head { name: "t".into(), datatype, shape: shape.to_vec() }
    }

    #[test]
    fn bytes_and_json_are_two_ways_to_say_the_same() {
        let cases: [(&str, &[u8], Value); 7] = [
            ("BOOL", &[0, 1], value!([false, true])),
            ("INT8", &[255, 1], value!([-1, 1])),
            ("UINT16", &[255, 255, 1, 0], value!([65535, 1])),
            ("INT32", &[254, 255, 255, 255, 7, 0, 0, 0], value!([-2, 7])),
            ("FP32", &[0, 0, 0, 63, 0, 0, 128, 191], value!([0.5, -1.0])),
            ("BYTES", &[2, 0, 0, 0, 195, 169, 0, 0, 0, 0], value!(["é", ""])),
            ("UINT8", &[7, 8], value!([[7], [8]])),
        ];
        for (datatype, bytes, json) in cases {
            let tensor = head(datatype, &[2, 1]).with_bytes(bytes).unwrap();
            assert_eq!(tensor, head(datatype, &[2, 1]).with_json(json).unwrap(), "{datatype}");
            if datatype == "BYTES" {
                assert_eq!(tensor.bytes(), bytes);
            }
        }
        let wide = head("INT64", &[1]).with_bytes(&(-3i64).to_le_bytes()).unwrap();
        assert_eq!(wide.data, [value!(-3)]);
        let wide = head("FP64", &[1]).with_bytes(&0.25f64.to_le_bytes()).unwrap();
        assert_eq!(wide.data, [value!(0.25)]);
    }

    #[test]
    fn what_is_no_tensor_is_named() {
        let faults = [
            head("BYTES", &[1]).with_bytes(&[9, 0, 0, 0, 65]),
            head("BYTES", &[1]).with_bytes(&[1, 0, 0, 0, 255]),
            head("BYTES", &[1]).with_bytes(&[1, 0]),
            head("BYTES", &[2]).with_bytes(&[1, 0, 0, 0, 65]),
            head("INT32", &[1]).with_bytes(&[1, 0, 0]),
            head("FP32", &[1]).with_bytes(&f32::NAN.to_le_bytes()),
            head("INT32", &[1]).with_json(value!([1.5])),
            head("BYTES", &[1]).with_json(value!([1])),
            head("BYTES", &[1]).with_json(value!("a")),
            head("BYTES", &[2]).with_json(value!(["a"])),
            head("BYTES", &[u64::MAX, 3]).with_json(value!(["a"])),
        ];
        for fault in faults {
            assert_eq!(fault.unwrap_err().param.as_deref(), Some("t"));
        }
    }
}
