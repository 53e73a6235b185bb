//! Operations of ours in candle's graph, and a backward pass that knows them.
//!
//! Each operation is a candle `CustomOp`, so `Tensor::backward` works on any mixture of ours and
//! candle's. But candle adds every gradient into fresh zeros, which costs about as much as the
//! arithmetic; so when a graph is made of our operations alone, [`backward`] walks it itself and hands
//! gradients on as they are.

use candle_core::backprop::GradStore;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Error, Layout, Result, Shape, Storage,
    Tensor, TensorId, bail,
};
use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// From an operation's output and the output's gradient to the gradients of its inputs; `None` for an
/// input that needs none.
type Backward = dyn Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync;

struct Node {
    name: &'static str,
    inputs: Vec<Tensor>,
    /// Handed to candle when it asks for the forward pass, which has been computed before.
    output: Mutex<Option<Vec<f32>>>,
    shape: Shape,
    backward: Box<Backward>,
}

/// The nodes that candle's graphs hold, by output. Dead ones are swept out now and then.
static NODES: Mutex<Option<HashMap<TensorId, Weak<Node>>>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a tensor of `output` that candle knows as the result of an operation on 1 to 3 `inputs`.
pub fn record(
    name: &'static str,
    inputs: &[&Tensor],
    output: Vec<f32>,
    shape: impl Into<Shape>,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let shape = shape.into();
    if !inputs.iter().any(|t| t.track_op()) {
        return Tensor::from_vec(output, shape, &Device::Cpu);
    }
    let node = Arc::new(Node {
        name,
        inputs: inputs.iter().map(|&t| t.clone()).collect(),
        output: Mutex::new(Some(output)),
        shape,
        backward: Box::new(backward),
    });
    let weak = Arc::downgrade(&node);
    let result = match inputs {
        [a] => a.apply_op1(Op(node))?,
        [a, b] => a.apply_op2(b, Op(node))?,
        [a, b, c] => a.apply_op3(b, c, Op(node))?,
        _ => bail!("{name}: an operation has one to three inputs, not {}", inputs.len()),
    };
    let mut nodes = lock(&NODES);
    let nodes = nodes.get_or_insert_default();
    if nodes.len() == nodes.capacity() {
        nodes.retain(|_, node| node.strong_count() > 0);
    }
    nodes.insert(result.id(), weak);
    Ok(result)
}

/// The operations of `order` (variables left out), if all of them are ours.
fn known(order: &[&Tensor]) -> Option<Vec<Arc<Node>>> {
    let nodes = lock(&NODES);
    let find = |t: &Tensor| nodes.as_ref()?.get(&t.id())?.upgrade();
    order.iter().map(|t| find(t)).collect()
}

/// Whether [`backward`] can walk the graph under `loss` itself.
#[cfg(test)]
pub fn is_ours(loss: &Tensor) -> bool {
    let order = loss.sorted_nodes();
    order.iter().all(|t| t.is_variable() || known(&[t]).is_some())
}

/// Gradients of all variables under `loss`, a scalar.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    match backward_from(loss, &loss.ones_like()?)? {
        Some(store) => Ok(store),
        None => loss.backward(),
    }
}

/// Gradients of all variables under `output`, whose own is `grad`; `None` if some operation there is not
/// ours.
pub fn backward_from(output: &Tensor, grad: &Tensor) -> Result<Option<GradStore>> {
    let mut order = output.sorted_nodes();
    order.retain(|t| !t.is_variable());
    let Some(nodes) = known(&order) else { return Ok(None) };
    let mut store = GradStore::default();
    store.insert(output, grad.clone());
    for (output, node) in order.into_iter().zip(&nodes) {
        let Some(grad) = store.remove(output) else { continue };
        let grads = (node.backward)(output, &grad)?;
        drop(grad);
        for (input, grad) in node.inputs.iter().zip(grads) {
            let Some(grad) = grad.filter(|_| input.track_op()) else { continue };
            let sum = match store.remove(input) {
                Some(other) => super::pointwise::add_values(&other, &grad)?,
                None => grad,
            };
            store.insert(input, sum);
        }
    }
    Ok(Some(store))
}

/// candle's handle on a node.
struct Op(Arc<Node>);

impl Op {
    fn take(&self) -> Result<(CpuStorage, Shape)> {
        match lock(&self.0.output).take() {
            Some(output) => Ok((CpuStorage::F32(output), self.0.shape.clone())),
            None => bail!("{}: the forward pass was asked for twice", self.0.name),
        }
    }

    fn grads<const N: usize>(&self, output: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        let grads = (self.0.backward)(output, grad)?;
        grads.try_into().map_err(|_| Error::Msg(format!("{}: gradients missing", self.0.name)))
    }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, _: &Tensor, output: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [a] = self.grads(output, grad)?;
        Ok(a)
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        output: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.grads(output, grad)?;
        Ok((a, b))
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        output: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.grads(output, grad)?;
        Ok((a, b, c))
    }
}

/// The elements of a tensor, which must be a dense f32 one on the CPU.
pub fn elements(tensor: &Tensor) -> Result<impl Deref<Target = [f32]> + '_> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a tensor of shape {:?} is not dense", layout.shape());
    };
    View::new(storage, start..end)
}

struct View<G> {
    storage: G,
    range: Range<usize>,
}

fn f32s(storage: &Storage) -> Result<&[f32]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice::<f32>(),
        _ => bail!("a kernel for the CPU got a tensor of another device"),
    }
}

impl<G: Deref<Target = Storage>> View<G> {
    fn new(storage: G, range: Range<usize>) -> Result<Self> {
        if f32s(&storage)?.get(range.clone()).is_none() {
            bail!("a tensor is larger than its storage");
        }
        Ok(Self { storage, range })
    }
}

impl<G: Deref<Target = Storage>> Deref for View<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        f32s(&self.storage).map_or(&[], |all| &all[self.range.clone()])
    }
}
