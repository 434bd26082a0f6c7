import CMLXShim
import Foundation

public enum MLXError: LocalizedError, Sendable, Equatable {
    case caught(String)
    public var errorDescription: String? {
        switch self { case .caught(let message): "MLX Error: \(message)" }
    }
}

private final class Caught: @unchecked Sendable {
    @TaskLocal static var here: Caught?
    private let lock = NSLock()
    private var first: MLXError?

    func note(_ message: String) { lock.withLock { first = first ?? .caught(message) } }
    func check() throws { if let error = lock.withLock({ first }) { throw error } }
}

/// What every failed call ends in: the enclosing `withError` throws, without one the process ends.
func reportError() {
    let message = String(cString: mx_error())
    guard let caught = Caught.here else { fatalError("MLX: \(message)") }
    caught.note(message)
}

public func withError<R>(_ body: () throws -> R) throws -> R {
    let caught = Caught()
    return try Caught.$here.withValue(caught) {
        let result = try body()
        try caught.check()
        return result
    }
}
public func withError<R>(_ body: () async throws -> R) async throws -> R {
    let caught = Caught()
    return try await Caught.$here.withValue(caught) {
        let result = try await body()
        try caught.check()
        return result
    }
}
