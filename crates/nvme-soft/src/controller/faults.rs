//! Faults, as the embedder injects them.

use super::SoftController;
use crate::engine::Engine;
use crate::fault::{Fault, FaultError, FaultKind, Loss};

impl SoftController {
    /// Adds a fault, after those that there are. Returns when it is in effect.
    ///
    /// A fault that loses what is not durable makes the controller keep that apart from now on, as
    /// [`Config::track_unflushed`](crate::Config::track_unflushed) does: what was written before is
    /// not lost.
    ///
    /// # Errors
    ///
    /// [`FaultError`] if it makes no sense.
    pub fn inject(&self, fault: Fault) -> Result<(), FaultError> {
        fault.check()?;
        self.shared.call(move |engine| engine.inject(fault));
        Ok(())
    }

    /// Forgets all faults. Commands that were struck stay as they are:
    /// [`SoftController::release_stuck`] ends those that wait. Returns when it is in effect.
    pub fn clear_faults(&self) {
        self.shared.call(Engine::clear_faults);
    }

    /// Lets all commands that are swallowed, held or put out of order go on: what was not done for
    /// them is done, and they complete, late. Those that were forgotten by a reset or with their
    /// queue do not come back.
    pub fn release_stuck(&self) {
        self.shared.call(Engine::release_stuck);
    }

    /// How often faults of this kind struck.
    pub fn faults_hit(&self, kind: FaultKind) -> u64 {
        self.shared.counters.faults[kind as usize].get()
    }

    /// Loses power, which is back at once: commands in flight vanish, what was written and is not
    /// durable is lost as `loss` says, each logical block by itself, and the controller is disabled
    /// with all registers as at the start. Returns when it is in effect.
    ///
    /// What is not durable is known if [`Config::track_unflushed`](crate::Config::track_unflushed)
    /// is set; otherwise nothing is lost.
    pub fn power_loss(&self, loss: Loss) {
        self.shared.call(move |engine| engine.lose_power(loss));
    }

    /// Sets CSTS.CFS: nothing is served any more, and only a reset leads out. Returns when it is in
    /// effect.
    pub fn fail(&self) {
        self.shared
            .call(|engine| engine.fail("the embedder wants it to"));
    }

    /// Removes the function from the bus, as when it is pulled out: registers read as all ones,
    /// writes and doorbells go nowhere, host memory is not accessed and resets fail. Of what was
    /// written and is not durable, `loss` is lost as by [`SoftController::power_loss`]. Returns when
    /// it is in effect.
    pub fn vanish(&self, loss: Loss) {
        self.shared.call(move |engine| engine.vanish(loss));
    }

    /// Brings a function back that has vanished, as after [`SoftController::start`]. Returns when it
    /// is in effect.
    pub fn reappear(&self) {
        self.shared.call(Engine::reappear);
    }
}
