//! Runtimes that poll their queues when they have nothing else to do.
//!
//! In any Tokio runtime a task polls for completions, in bursts between which others run. A runtime of
//! this [`Builder`] polls in its park hook instead: when no task can run it rings the doorbells that
//! were left, takes completions, and polls for as long as that pays, before it sleeps. That saves the
//! task's turns, and takes completions in larger batches. It breaks off when another thread makes a task
//! runnable, and every 20 µs to look for timers and sockets.
//!
//! It is for one runtime for each thread, with what is open in it: a
//! [`LocalNamespace`](crate::LocalNamespace), or a [`Namespace`](crate::Namespace) that may be shared
//! with others.
//!
//! ```
//! let runtime = nvme_async::runtime::Builder::new().build_local()?;
//! runtime.block_on(async {
//!     let namespace = nvme_async::open("mem:?size=16M").await?;
//!     let local = namespace.local()?;
//!     assert_eq!(local.read(0, 4096).await?, [0; 4096].as_slice());
//!     drop(local);
//!     namespace.controller().shutdown().await
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fmt;
use std::io;
use std::sync::Arc;

use tokio::runtime::{self, LocalOptions, LocalRuntime, Runtime};

use crate::engine::park::Hook;

/// Builds runtimes of one thread with all drivers enabled, which poll in their park hook.
pub struct Builder {
    inner: runtime::Builder,
    on_park: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Builder {
    /// The defaults of Tokio, for a runtime of the calling thread.
    pub fn new() -> Self {
        let mut inner = runtime::Builder::new_current_thread();
        inner.enable_all();
        Self {
            inner,
            on_park: None,
        }
    }

    /// Changes what else there is to be changed. A park hook that is set here is lost; there is
    /// [`on_thread_park`](Self::on_thread_park).
    pub fn configure(mut self, configure: impl FnOnce(&mut runtime::Builder)) -> Self {
        configure(&mut self.inner);
        self
    }

    /// Sets a function that is called each time before the thread goes to sleep, after the queues were
    /// polled. As with Tokio's, tasks that it wakes keep the thread awake.
    pub fn on_thread_park(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.on_park = Some(Box::new(f));
        self
    }

    /// Builds a runtime whose tasks may be spawned from anywhere.
    ///
    /// # Errors
    ///
    /// Those of [`tokio::runtime::Builder::build`].
    pub fn build(mut self) -> io::Result<Runtime> {
        let hook = self.hook();
        let runtime = self.inner.build()?;
        hook.serve(runtime.handle().id());
        Ok(runtime)
    }

    /// Builds a runtime for tasks that stay on this thread, as those of a
    /// [`LocalNamespace`](crate::LocalNamespace) do.
    ///
    /// # Errors
    ///
    /// Those of [`tokio::runtime::Builder::build_local`].
    pub fn build_local(mut self) -> io::Result<LocalRuntime> {
        let hook = self.hook();
        let runtime = self.inner.build_local(LocalOptions::default())?;
        hook.serve(runtime.handle().id());
        Ok(runtime)
    }

    fn hook(&mut self) -> Arc<Hook> {
        let hook = Arc::new(Hook::default());
        let own = hook.clone();
        let other = self.on_park.take();
        self.inner.on_thread_park(move || {
            own.park();
            if let Some(other) = &other {
                other();
            }
        });
        hook
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}
