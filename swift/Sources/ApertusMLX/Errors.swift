import ApertusCore
import MLX

/// Runs `body`, in which an error of MLX does not end the process but is thrown.
///
/// - Parameter doing: what `body` does, for the error.
/// - Throws: `ApertusError`; what `body` itself throws, as it is.
func catchingMLX<R>(_ doing: @autoclosure () -> String, _ body: () throws -> R) throws -> R {
    do {
        return try withError(body)
    } catch let MLXError.caught(message) {
        let line = message.split(whereSeparator: \.isNewline).joined(separator: " ")
        let isMemory = line.contains("allocate") || line.contains("memory")
        throw ApertusError(isMemory ? .resource : .bug, "\(doing()): \(line.prefix(300))")
    }
}
