import Dispatch

/// Listens for the system's warnings that memory runs short; there are none on Linux.
final class MemoryPressure: Sendable {
    #if canImport(Darwin)
        private let source: any DispatchSourceMemoryPressure

        init(_ warned: @escaping @Sendable () -> Void) {
            source = DispatchSource.makeMemoryPressureSource(
                eventMask: [.warning, .critical], queue: .global(qos: .userInitiated))
            source.setEventHandler(handler: warned)
            source.resume()
        }

        deinit { source.cancel() }
    #else
        init(_ warned: @escaping @Sendable () -> Void) {}
    #endif
}
