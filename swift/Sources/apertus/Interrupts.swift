import Dispatch
import Foundation

/// Ctrl-C: the first one ends what is under way, the second the program.
final class Interrupts: @unchecked Sendable {
    private let lock = NSLock()
    private var count = 0
    private var action: (@Sendable () -> Void)?
    private let source: DispatchSourceSignal

    init() {
        // From here on the source alone hears of it.
        signal(SIGINT, SIG_IGN)
        signal(SIGPIPE, SIG_IGN)
        source = DispatchSource.makeSignalSource(signal: SIGINT, queue: .global())
        source.setEventHandler { [weak self] in self?.heard() }
        source.resume()
    }

    /// Have `action` done at the next interrupt, until `clear`.
    func expect(_ action: @escaping @Sendable () -> Void) {
        lock.withLock { (count, self.action) = (0, action) }
    }

    /// Whether there was one since `expect`; there is nothing under way any more.
    @discardableResult
    func clear() -> Bool {
        lock.withLock {
            action = nil
            return count > 0
        }
    }

    private func heard() {
        let (count, action) = lock.withLock {
            self.count += 1
            return (self.count, self.action)
        }
        guard let action, count == 1 else { exit(130) }
        action()
    }
}
